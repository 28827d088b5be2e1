"""Gradients added over the ranks while backward still computes the others; knows no model, no loss and no schedule.

Gradients are views of the optimizer's flat fp32 buffers, so a bucket is a slice of one: it is added in place and in
fp32, whatever the model computes in, and nothing is packed or copied. Micro-batches before the last only accumulate.
torch's DistributedDataParallel would reduce the rounded gradients of each parameter, out of buffers of its own.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor, nn

from smelt.training.optim import Optimizer, ParameterGroup
from smelt.training.parallel import Ranks, lost_ranks_explained

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
                assert bucket.work is not None, "all have been sent"
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
        bucket.work = dist.all_reduce(bucket.gradients, async_op=True)
        self._num_sent += 1


def buckets_of(group: ParameterGroup) -> list[Bucket]:
    """A buffer in pieces that end between parameters, from its end to its beginning, as backward fills it."""
    buckets: list[Bucket] = []
    end = len(group.gradients)
    names: list[str] = []
    for name, (where, _) in reversed(group.slices.items()):
        names.append(name)
        if (end - where.start) * group.gradients.element_size() >= BUCKET_BYTES or where.start == 0:
            buckets.append(Bucket(group.gradients[where.start : end], names))
            end, names = where.start, []
    return buckets
