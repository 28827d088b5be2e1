"""The sum of gradients over ranks against one process that sees all rows; what a lost rank looks like."""

import os
from pathlib import Path

import pytest
import torch
from torch import nn

from ranks import on_two_ranks
from smelt.errors import LostRank
from smelt.training import parallel
from smelt.training.gradient_sum import BUCKET_BYTES, GradientSum, buckets_of
from smelt.training.optim import Optimizer, flatten
from smelt.training.parallel import Ranks, join, lost_ranks_explained, read_ranks, threads_per_rank

WIDTH = 1500  # three layers of 9 MB, so that there are several buckets


class Net(nn.Module):
    """Three wide layers, of which the middle one counts twice; one more is never used. Few rows of a table are."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.shared, self.last = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.unused = nn.Linear(WIDTH, 2)
        self.table = nn.Embedding(2 * WIDTH, 30, sparse=True)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        ids = (rows[:, :9].float().abs() * 10_000).long() % len(self.table.weight)
        looked_up = self.table(ids).square().mean(dim=(1, 2))
        return self.last(self.shared(self.shared(self.first(rows)).tanh()).tanh()) + 0.1 * looked_up[:, None]


def rows_of(number: int) -> torch.Tensor:
    return torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(number))


def summed(ranks: Ranks, dtype: torch.dtype, num_steps: int = 2) -> list[torch.Tensor]:
    """The flat gradients of the last of some steps, each over 2 micro-batches of 2 rows per two ranks."""
    torch.set_num_threads(1)
    net = Net().to(dtype)
    optimizer = Optimizer(net, dtype, (0.9, 0.95), 0.0, 0.0)
    gradient_sum = GradientSum(net, optimizer, ranks)
    for number in range(num_steps):
        optimizer.zero_gradients()
        own = rows_of(number).to(dtype)[ranks.rows(4)].split(1)
        for index, rows in enumerate(own):
            if index == len(own) - 1:
                gradient_sum.begin()
            net(rows).float().square().sum().backward()
        gradient_sum.finish()
    return [gradients.clone() for gradients in optimizer.gradients()]


def work(dtype: torch.dtype, by_memory: bool, leaves_early: bool = False) -> object:
    """What a rank sends; a rank that leaves early says nothing, and the other what became of it then."""
    ranks = read_ranks()
    parallel.is_possible = lambda *_: by_memory
    if not leaves_early:
        with join(ranks, torch.device("cpu")):
            return [tensor.numpy() for tensor in summed(ranks, dtype)]
    try:
        with join(ranks, torch.device("cpu")):
            if ranks.rank == 1:
                os._exit(1)
            return summed(ranks, dtype)
    except LostRank as error:
        return str(error)


@pytest.mark.slow
@pytest.mark.parametrize("by_memory", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-5)])
def test_two_ranks_have_the_gradients_of_one(
    tmp_path: Path, dtype: torch.dtype, tolerance: float, by_memory: bool
) -> None:
    """In bf16 too: each row's gradient is rounded alone, and added in fp32, however many ranks there are."""
    alone = summed(Ranks(), dtype)
    one, other = on_two_ranks(tmp_path, work, dtype, by_memory)
    assert len(alone) == 3  # matrices, vectors, and the rows of the table
    for index, expected in enumerate(alone):
        for found in (one, other):
            tensor = torch.from_numpy(found[index])  # type: ignore[index]
            torch.testing.assert_close(tensor, expected, atol=tolerance, rtol=1e-5)
    assert float(alone[0].abs().max()) > 0


@pytest.mark.slow
@pytest.mark.parametrize("by_memory", [True, False])
def test_a_rank_that_is_gone_is_named_as_the_reason(tmp_path: Path, by_memory: bool) -> None:
    heard, nothing = on_two_ranks(tmp_path, work, torch.float32, by_memory, True)
    assert nothing is None
    assert "another rank has ended or cannot be reached" in str(heard)
    assert "--init-from resume" in str(heard)


def test_buckets_cover_each_parameter_once_from_the_end() -> None:
    net = Net()
    group = flatten({name: p for name, p in net.named_parameters() if p.dim() >= 2}, torch.float32)
    buckets = buckets_of(group)
    assert len(buckets) > 2
    assert [name for bucket in buckets for name in bucket.names] == list(reversed(group.slices))
    assert sum(len(bucket.gradients) for bucket in buckets) == len(group.gradients)
    assert all(bucket.gradients.numel() * 4 >= BUCKET_BYTES for bucket in buckets[:-1])
    assert buckets[0].gradients.data_ptr() > buckets[-1].gradients.data_ptr() == group.gradients.data_ptr()


def test_one_rank_sums_nothing() -> None:
    net = Net()
    gradient_sum = GradientSum(net, Optimizer(net, torch.float32, (0.9, 0.95), 0.0, 0.0), Ranks())
    gradient_sum.begin()
    gradient_sum.finish()
    assert gradient_sum.buckets == gradient_sum.tables == []


def test_threads_are_shared_by_the_ranks_of_a_machine() -> None:
    assert threads_per_rank(Ranks(0, 2, 0, 2), 8) == 4
    assert threads_per_rank(Ranks(0, 2, 0, 2), 1) == 1
    assert threads_per_rank(Ranks(0, 2), 8) == 8, "the other rank is on another machine"


def test_other_errors_of_the_machine_pass_the_explanation() -> None:
    with pytest.raises(KeyError), lost_ranks_explained():
        raise KeyError("no rank's fault")
    with pytest.raises(RuntimeError, match="no memory"), lost_ranks_explained(among_others=True):
        raise RuntimeError("no memory")
    for error in (
        RuntimeError("[gloo/transport/tcp/pair.cc:537] Read error"),
        torch.distributed.DistBackendError("NCCL"),
    ):
        with pytest.raises(LostRank), lost_ranks_explained(among_others=True):
            raise error
