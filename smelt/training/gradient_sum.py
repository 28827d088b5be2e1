"""Gradients added over the ranks while backward still computes the others; knows no model, no loss and no schedule.

Gradients are views of the optimizer's flat fp32 buffers, so a bucket is a slice of one: it is added in place and in
fp32, whatever the model computes in, and nothing is packed or copied. Micro-batches before the last only accumulate.
torch's DistributedDataParallel would reduce the rounded gradients of each parameter, out of buffers of its own.

Of tables only the rows that were looked up travel, and are added up in the order of the ranks.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from smelt.training.lookup_table import Touched
from smelt.training.optim import Optimizer, ParameterGroup
from smelt.training.parallel import Ranks, lost_ranks_explained, shared_memory

BUCKET_BYTES = 8 * 2**20  # small enough that the first leaves early, large enough that the wire is used well


@dataclass
class Bucket:
    """Neighbours in a flat buffer, whose gradients travel together."""

    gradients: Tensor  # fp32, flat: a view
    names: list[str]
    num_missing: int = 0  # parameters that backward has not reached yet
    work: dist.Work | None = None


class GradientSum:
    """The sum of every rank's gradients, at the end of each step's last backward pass.

    Every rank sends its buckets in the same order, that in which backward usually completes them: one that is early
    waits for those before it, and one that backward never touches is sent at the end.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, ranks: Ranks) -> None:
        self.buckets = [bucket for group in optimizer.groups for bucket in buckets_of(group)]
        self.tables = optimizer.tables
        self._is_last = False
        self._num_sent = 0
        if ranks.world_size == 1:
            self.buckets, self.tables = [], []
            return
        if shared_memory() is not None:
            return
        parameters = dict(model.named_parameters())
        for bucket in self.buckets:
            for name in bucket.names:
                # Runs after the optimizer's own hook, which adds a rounded gradient to its fp32 sum.
                parameters[name].register_post_accumulate_grad_hook(self._noting(bucket))  # type: ignore[no-untyped-call]

    def begin(self) -> None:
        """The backward pass that comes is the step's last one: its gradients leave as soon as they are complete."""
        self._is_last = True
        for bucket in self.buckets:
            bucket.num_missing = len(bucket.names)

    def finish(self) -> None:
        """Returns when every gradient is the sum of all ranks'; LostRank where one is gone."""
        if (shared := shared_memory()) is not None:
            for bucket in self.buckets:
                shared.sum_(bucket.gradients)
            self._collect(shared.gather)
            return
        self._is_last = False
        with lost_ranks_explained():
            while self._num_sent < len(self.buckets):
                self._send_next()
            self._collect(gathered)
            for bucket in self.buckets:
                if bucket.work is not None:
                    bucket.work.wait()
                    bucket.work = None
        self._num_sent = 0

    def _collect(self, gather: Callable[[Tensor], list[Tensor]]) -> None:
        """Give each table the rows of all ranks."""
        for table in self.tables:
            table.take_instead([unpacked(rows) for rows in gather(packed(table.gradients()))])

    def _noting(self, bucket: Bucket) -> Callable[[Tensor], None]:
        def note(_parameter: Tensor) -> None:
            if not self._is_last:
                return
            bucket.num_missing -= 1
            with lost_ranks_explained():
                while self._num_sent < len(self.buckets) and self.buckets[self._num_sent].num_missing == 0:
                    self._send_next()

        return note

    def _send_next(self) -> None:
        bucket = self.buckets[self._num_sent]
        self._num_sent += 1
        bucket.work = dist.all_reduce(bucket.gradients, async_op=True)


def packed(touched: Touched) -> Tensor:
    """(R, 1 + C) fp32: of each row its number, as bits, and its gradient."""
    ids, gradients = touched
    return torch.cat((ids.to(torch.int32).view(torch.float32)[:, None], gradients), dim=1)


def unpacked(rows: Tensor) -> Touched:
    """What `packed` was given."""
    return rows[:, 0].contiguous().view(torch.int32).long(), rows[:, 1:]


def gathered(rows: Tensor) -> list[Tensor]:
    """Each rank's rows, of which each may have another number."""
    nums = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(dist.get_world_size())]
    dist.all_gather(nums, torch.tensor([len(rows)], device=rows.device))
    most = max(map(int, nums))
    received = [rows.new_empty(most, rows.shape[1]) for _ in nums]
    dist.all_gather(received, torch.cat((rows, rows.new_zeros(most - len(rows), rows.shape[1]))))
    return [theirs[:num] for theirs, num in zip(received, map(int, nums), strict=True)]


class ShardedSum:
    """The same for a model in shards, whose gradients torch adds itself: see `sharding`.

    Who has room for whole gradients adds them up alone until the last backward pass (torch's `no_sync`), and keeps the
    gathered weights until then. Where weights are in shards to save memory, so are gradients after every pass.
    """

    def __init__(self, model: Any, ranks: Ranks) -> None:
        self._model = model
        self._waits = ranks.sharding == "optimizer"
        self.finish()

    def begin(self) -> None:
        """The backward pass that comes is the step's last one."""
        self._set(is_last=True)

    def finish(self) -> None:
        """Backward has returned when all gradients were added; the next step's passes begin."""
        self._set(is_last=not self._waits)

    def _set(self, *, is_last: bool) -> None:
        self._model.set_requires_gradient_sync(is_last)
        self._model.set_reshard_after_backward(is_last)


def buckets_of(group: ParameterGroup) -> list[Bucket]:
    """A buffer in pieces that end between parameters, from its end to its beginning, as backward fills it."""
    buckets: list[Bucket] = []
    end = len(group.gradients)
    names: list[str] = []
    for name, (where, _) in reversed(group.slices.items()):
        names.append(name)
        is_full = (end - where.start) * group.gradients.element_size() >= BUCKET_BYTES
        if is_full or where.start == 0:
            buckets.append(Bucket(group.gradients[where.start : end], names))
            end, names = where.start, []
    return buckets
