"""Tables of which few rows are touched against torch's AdamW over all of them."""

import pytest
import torch
from torch import Tensor, nn

from smelt.training import lookup_table
from smelt.training.lookup_table import added_up, is_closed_form
from smelt.training.optim import Optimizer

pytestmark = pytest.mark.usefixtures("computed_by")

V, C, BETAS = 50, 20, (0.9, 0.99)


def looked_up(step: int) -> Tensor:
    """A few rows, some of them twice, and others in other steps."""
    return torch.randint(0, V, (2, 3), generator=torch.Generator().manual_seed(step)) % (V if step % 3 else 7)


def rate(step: int) -> float:
    return 0.01 * (1 - step / 100)


class Net(nn.Module):
    """The mean of what is looked up, by a layer."""

    def __init__(self, *, sparse: bool) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.table = nn.Embedding(V, C, sparse=sparse)
        self.layer = nn.Linear(C, 3)

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.layer(self.table(ids).mean(dim=1).tanh())
        return logits


def optimizer_of(net: nn.Module, dtype: torch.dtype = torch.float32) -> Optimizer:
    return Optimizer(net, dtype, BETAS, weight_decay=0.3, grad_clip=0.5)


def train(net: nn.Module, optimizer: Optimizer, steps: range) -> list[float]:
    """Two micro-batches a step."""
    losses = []
    for step in steps:
        for ids in looked_up(step).split(1):
            loss = nn.functional.cross_entropy(net(ids).float(), ids[:, 0] % 3)
            loss.backward()
        losses.append(loss.item())
        assert optimizer.step(rate(step)) is not None
    return losses


@pytest.mark.parametrize("period", [7, 1024])
def test_waiting_rows_are_where_adamw_would_have_taken_them(period: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookup_table, "PERIOD", period)
    net, dense_net = Net(sparse=True), Net(sparse=False)
    optimizer, dense = optimizer_of(net), optimizer_of(dense_net)
    assert [table.name for table in optimizer.tables] == ["table.weight"]
    assert dense.tables == []
    losses, expected = train(net, optimizer, range(60)), train(dense_net, dense, range(60))
    assert losses == pytest.approx(expected, abs=5e-5)
    optimizer.settle()
    torch.testing.assert_close(net.table.weight, dense_net.table.weight, rtol=0.0, atol=1e-3)  # its epsilon
    for kind in ("exp_avg", "exp_avg_sq"):
        ours, theirs = (each.named(each.buffers(), kind)["table.weight"] for each in (optimizer, dense))
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-8)


def test_a_run_that_was_settled_out_of_turn_goes_on_with_the_same_bits() -> None:
    whole, parts = Net(sparse=True), Net(sparse=True)
    uninterrupted, optimizer = optimizer_of(whole), optimizer_of(parts)
    expected = train(whole, uninterrupted, range(30))
    losses = train(parts, optimizer, range(17))
    optimizer.settle(out_of_turn=True)
    saved = {name: tensor.clone() for name, tensor in optimizer.buffers().items()}
    waiting = optimizer.waiting()
    fresh = Net(sparse=True)
    again = optimizer_of(fresh)
    for name, tensor in again.buffers().items():
        tensor.copy_(saved[name])
    again.num_steps = optimizer.num_steps
    again.wait_again(waiting)
    again.publish()
    losses += train(fresh, again, range(17, 30))
    assert losses == expected
    for each in (uninterrupted, again):
        each.settle()
    assert torch.equal(fresh.table.weight, whole.table.weight)


def test_a_settled_table_has_nothing_that_waits() -> None:
    net = Net(sparse=True)
    optimizer = optimizer_of(net)
    train(net, optimizer, range(5))
    optimizer.settle()
    before = net.table.weight.clone()
    assert optimizer.waiting() == {}
    optimizer.settle(out_of_turn=True)
    assert torch.equal(net.table.weight, before)
    optimizer.wait_again({})
    assert torch.equal(net.table.weight, before)


def test_in_bf16_a_model_reads_rounded_masters() -> None:
    net = Net(sparse=True).to(torch.bfloat16)
    optimizer = optimizer_of(net, torch.bfloat16)
    train(net, optimizer, range(20))
    optimizer.settle()
    (table,) = optimizer.tables
    assert table.masters.dtype == torch.float32
    assert net.table.weight.dtype == torch.bfloat16
    assert torch.equal(net.table.weight, table.masters.bfloat16())


def test_gradients_count_in_the_norm_and_can_be_forgotten() -> None:
    net, dense_net = Net(sparse=True), Net(sparse=False)
    optimizer, dense = optimizer_of(net), optimizer_of(dense_net)
    for each in (net, dense_net):
        each(looked_up(1)).square().sum().backward()
    assert optimizer.gradient_norm() == pytest.approx(dense.gradient_norm())
    optimizer.zero_gradients()
    assert optimizer.gradient_norm() == 0.0
    before = net.table.weight.clone()
    assert optimizer.step(0.1) == 0.0
    optimizer.settle()
    torch.testing.assert_close(net.table.weight, before * (1 - 0.1 * 0.3))


def test_rows_are_added_up_in_the_order_in_which_they_were_found() -> None:
    ones = torch.tensor([[1e8], [1.0], [-1e8], [1.0]])
    rows, gradients = added_up(torch.tensor([4, 2, 4, 4]), ones)
    assert rows.tolist() == [2, 4]
    assert gradients.tolist() == [[1.0], [1.0]]


def test_where_momentum_outlives_the_second_moment_no_row_waits() -> None:
    assert is_closed_form((0.9, 0.99))
    assert not is_closed_form((0.99, 0.9))
    net = Net(sparse=True)
    assert Optimizer(net, torch.float32, (0.99, 0.9), 0.1, 1.0).tables == []
    assert not net.table.sparse
