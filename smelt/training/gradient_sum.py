"""Gradients added over the ranks while backward still computes the others; knows no model, no loss and no schedule.

Gradients are views of the optimizer's flat fp32 buffers, so a bucket is a slice of one: it is added in place and in
fp32, whatever the model computes in, and nothing is packed or copied. Micro-batches before the last only accumulate.
torch's DistributedDataParallel would reduce the rounded gradients of each parameter, out of buffers of its own.

A batch touches few rows of a large embedding: these alone travel then, and are added up in the order of the ranks.
Shapes: V rows of C numbers.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from smelt.training.optim import Optimizer, ParameterGroup
from smelt.training.parallel import Ranks, lost_ranks_explained

BUCKET_BYTES = 8 * 2**20  # small enough that the first leaves early, large enough that the wire is used well
MOST_TOUCHED = 1 / 4  # of an embedding's rows, by all ranks together; else all of them travel


@dataclass
class Bucket:
    """Neighbours in a flat buffer, whose gradients travel together."""

    gradients: Tensor  # fp32, flat: a view
    names: list[str]
    width: int | None = None  # of the rows, where it is an embedding of its own
    num_missing: int = 0  # parameters that backward has not reached yet
    work: dist.Work | None = None


class GradientSum:
    """The sum of every rank's gradients, at the end of each step's last backward pass.

    Every rank sends its buckets in the same order, that in which backward usually completes them: one that is early
    waits for those before it, and one that backward never touches is sent at the end.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, ranks: Ranks) -> None:
        embeddings = large_embeddings(model)
        self.buckets = [bucket for group in optimizer.groups for bucket in buckets_of(group, embeddings)]
        self._is_last = False
        self._num_sent = 0
        if ranks.world_size == 1:
            self.buckets = []
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
        self._is_last = False
        with lost_ranks_explained():
            while self._num_sent < len(self.buckets):
                self._send_next()
            for bucket in self.buckets:
                if bucket.work is not None:
                    bucket.work.wait()
                    bucket.work = None
        self._num_sent = 0

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
        if bucket.width is None or not self._sum_touched(bucket.gradients.view(-1, bucket.width)):
            bucket.work = dist.all_reduce(bucket.gradients, async_op=True)

    def _sum_touched(self, table: Tensor) -> bool:  # (V, C)
        """Add up the rows that any rank has touched, unless these are too many."""
        bits = table.view(torch.int32)  # in a quarter of the time of `any`; a norm would miss the smallest numbers
        own_ids = ((bits.amax(dim=1) != 0) | (bits.amin(dim=1) != 0)).nonzero()[:, 0]
        nums = [torch.zeros(1, dtype=torch.int64, device=own_ids.device) for _ in range(dist.get_world_size())]
        dist.all_gather(nums, torch.tensor([len(own_ids)], device=own_ids.device))
        most = max(map(int, nums))
        if most * len(nums) > MOST_TOUCHED * len(table):
            return False
        spare = most - len(own_ids)
        ids = [own_ids.new_empty(most) for _ in nums]
        rows = [table.new_empty(most, table.shape[1]) for _ in nums]
        dist.all_gather(ids, torch.cat((own_ids, own_ids.new_zeros(spare))))
        dist.all_gather(rows, torch.cat((table[own_ids], table.new_zeros(spare, table.shape[1]))))
        table[own_ids] = 0.0
        for num, their_ids, theirs in zip(map(int, nums), ids, rows, strict=True):
            table.index_add_(0, their_ids[:num], theirs[:num])
        return True


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


def large_embeddings(model: nn.Module) -> dict[str, int]:
    """The names of embeddings that fill a bucket, and the width of their rows."""
    tables = ((f"{name}.weight", module) for name, module in model.named_modules() if isinstance(module, nn.Embedding))
    return {name: table.embedding_dim for name, table in tables if 4 * table.weight.numel() >= BUCKET_BYTES}


def buckets_of(group: ParameterGroup, embeddings: Mapping[str, int]) -> list[Bucket]:
    """A buffer in pieces that end between parameters, from its end to its beginning, as backward fills it.

    Each of `embeddings`, names and widths, is a piece of its own.
    """
    buckets: list[Bucket] = []
    end = len(group.gradients)
    names: list[str] = []
    for name, (where, _) in reversed(group.slices.items()):
        if name in embeddings:
            if names:
                buckets.append(Bucket(group.gradients[where.stop : end], names))
            end, names = where.stop, []
        names.append(name)
        is_full = (end - where.start) * group.gradients.element_size() >= BUCKET_BYTES
        if is_full or name in embeddings or where.start == 0:
            buckets.append(Bucket(group.gradients[where.start : end], names, embeddings.get(name)))
            end, names = where.start, []
    return buckets
