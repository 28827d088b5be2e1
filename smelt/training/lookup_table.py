"""AdamW for a table of which a batch looks up few rows: the others wait, and are brought up to date when they are read.

A row without a gradient still decays and still follows its momentum. What n such updates do to it has a closed form:
its moments shrink by powers of the betas, it keeps the product of the decays, and it moves along its first moment over
the root of the second, by a sum that depends on nothing of the row but how long it waits. So a step costs what its
batch touches, not what the table holds. The result is AdamW's, but for where its epsilon stands while a row waits.

Knows no model, no loss and no ranks. Shapes: V rows of C numbers in the table, R of them touched.
"""

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smelt.models.kernels import training_kernels
from smelt.models.training_kernels import Adam, Rows

PERIOD = 1024  # updates after which every row is brought up to date, so that what is known of missed ones is bounded
SETTLED_AT_ONCE = 2**16  # rows, which bounds the memory that settling takes
EPSILON = 1e-8  # torch's
NO_UPDATE = Adam(0.0, 0.0, 1.0, 0.0, 1.0, EPSILON)
Touched = tuple[Tensor, Tensor]  # (R,) numbers of rows, (R, C) their gradients


def is_closed_form(betas: tuple[float, float]) -> bool:
    """Whether waiting rows can be caught up: momentum must fade before the second moment does, or they run away."""
    return betas[0] ** 2 < betas[1]


class MissedUpdates:
    """What the updates since the last settling did to a row that has had no gradient since a given one of them."""

    def __init__(self, betas: tuple[float, float], weight_decay: float) -> None:
        self.betas = betas
        self.weight_decay = weight_decay
        self.num = 0
        self.kept = np.ones(PERIOD + 1)  # by the update that a row has seen last: what is left of it
        self.drift = np.zeros(PERIOD + 1)  # and how often it moves by its first moment over the second's root

    def add(self, learning_rate: float, num_updates: int) -> None:
        """One more, the `num_updates`-th of all. Loshchilov and Hutter 2019, with a gradient of 0."""
        beta1, beta2 = self.betas
        seen = slice(0, self.num + 1)
        correction = math.sqrt(1 - beta2**num_updates) / (1 - beta1**num_updates)
        waited = np.arange(self.num + 1, 0, -1)
        decay = 1 - learning_rate * self.weight_decay
        self.kept[seen] *= decay
        self.drift[seen] *= decay
        self.drift[seen] += learning_rate * correction * (beta1 / math.sqrt(beta2)) ** waited
        self.num += 1

    def factors(self) -> Tensor:
        """(num + 1, 4) by the update that was seen last: kept, drift, and what is left of both moments. fp32."""
        waited = np.arange(self.num, -1, -1)
        columns = (self.kept[: self.num + 1], self.drift[: self.num + 1], *(beta**waited for beta in self.betas))
        return torch.from_numpy(np.stack(columns, axis=1).astype(np.float32))

    def forget(self) -> None:
        """Every row is up to date."""
        self.num = 0
        self.kept.fill(1.0)
        self.drift.fill(0.0)


class LookupTable:
    """An embedding's masters and moments, and the gradients of the rows that were looked up."""

    def __init__(
        self, name: str, module: nn.Module, dtype: torch.dtype, betas: tuple[float, float], weight_decay: float
    ) -> None:
        """The module is one of torch's that says `sparse`; from now on its weights have `dtype`."""
        weight = module.weight
        assert isinstance(weight, nn.Parameter)
        self.name = name
        self.betas = betas
        self.weight_decay = weight_decay
        self.masters = weight.data.float()  # (V, C), the model's own where that is in fp32
        if dtype != torch.float32:
            weight.data = self.masters.to(dtype)
        self.weight = weight
        self.moments = torch.zeros_like(self.masters), torch.zeros_like(self.masters)
        self._kernels = training_kernels(self.masters)  # for good: they round otherwise than torch does
        self.missed = MissedUpdates(betas, weight_decay)
        self.last_seen = torch.zeros(len(weight), dtype=torch.int32, device=weight.device)  # (V,), since the settling
        self.found: list[Touched] = []  # as backward gives them
        self._touched: Touched | None = None
        self.waiting: dict[str, Tensor] = {}  # all of it as it was before it was settled out of turn
        module.register_forward_pre_hook(self._before_lookup)
        weight.register_post_accumulate_grad_hook(self._take)  # type: ignore[no-untyped-call]

    def _before_lookup(self, _module: nn.Module, arguments: tuple[Any, ...]) -> None:
        self.bring_up_to_date(arguments[0].flatten())

    def _take(self, weight: Tensor) -> None:
        assert weight.grad is not None, "the hook runs after the gradient is there"
        self.found.append((weight.grad._indices()[0], weight.grad._values().float()))
        self._touched = weight.grad = None

    def gradients(self) -> Touched:
        """What was looked up since the last update, as often as it was."""
        none = self.last_seen.new_zeros(0, dtype=torch.int64), self.masters[:0]
        ids, gradients = zip(none, *self.found, strict=True)
        return torch.cat(ids), torch.cat(gradients)

    def take_instead(self, found: list[Touched]) -> None:
        """What all ranks have looked up."""
        self.found, self._touched = found, None

    def touched(self) -> Touched:
        """The rows that were looked up since the last update, each once and in order, with their gradients."""
        if self._touched is None:
            self._touched = added_up(*self.gradients())
        return self._touched

    def forget_gradients(self) -> None:
        """Of what was looked up."""
        self.found.clear()
        self._touched = None

    @torch.no_grad()
    def bring_up_to_date(self, ids: Tensor) -> None:  # (R,), some of them twice
        """Let rows see all updates so far."""
        if self.missed.num:
            self._advance(ids, None, NO_UPDATE)

    @torch.no_grad()
    def update(self, learning_rate: float, num_updates: int) -> None:
        """One step of AdamW, the `num_updates`-th, by what was found; `touched` is what it takes for gradients."""
        ids, gradients = self.touched()
        corrections = [1 - beta**num_updates for beta in self.betas]
        keeps, rate = 1 - learning_rate * self.weight_decay, learning_rate / corrections[0]
        self._advance(ids, gradients, Adam(*self.betas, keeps, rate, math.sqrt(corrections[1]), EPSILON))
        self.missed.add(learning_rate, num_updates)
        if num_updates % PERIOD == 0:
            self.settle()

    def _advance(self, ids: Tensor, gradients: Tensor | None, adam: Adam) -> None:
        """Let rows see all updates so far, and this one where there are gradients."""
        if self._kernels is not None:
            rows = Rows((self.masters, *self.moments), self.last_seen, ids.contiguous())
            self._kernels.update_rows(rows, self.missed.factors(), gradients, adam)
        else:
            self._advance_by_torch(ids, gradients, adam)
        if self.weight.dtype != torch.float32:
            self.weight.data.index_copy_(0, ids, self.masters.index_select(0, ids).to(self.weight.dtype))

    def _advance_by_torch(self, ids: Tensor, gradients: Tensor | None, adam: Adam) -> None:
        first, second = (moment.index_select(0, ids) for moment in self.moments)
        factors = self.missed.factors().to(ids.device)
        kept, drift, *fades = factors.index_select(0, self.last_seen[ids]).T.unsqueeze(-1)
        moved = (first / second.sqrt().add_(EPSILON)).mul_(drift)
        masters = self.masters.index_select(0, ids).mul_(kept).sub_(moved)
        first, second = first.mul_(fades[0]), second.mul_(fades[1])
        if gradients is not None:
            first.lerp_(gradients, 1 - adam.beta1)
            second.mul_(adam.beta2).addcmul_(gradients, gradients, value=1 - adam.beta2)
            bound = second.sqrt().div_(adam.root).add_(adam.epsilon)
            masters.mul_(adam.keeps).addcdiv_(first, bound, value=-adam.rate)
        for table, rows_of_it in zip((self.masters, *self.moments), (masters, first, second), strict=True):
            table.index_copy_(0, ids, rows_of_it)
        self.last_seen[ids] = self.missed.num + (gradients is not None)

    def settle(self, *, out_of_turn: bool = False) -> None:
        """Bring every row up to date.

        `out_of_turn`: when is not given by the settings alone. How it was is kept then, for who goes on from here to
        round as a run does that was not interrupted.
        """
        self.waiting = {}
        if not self.missed.num:
            return
        if out_of_turn:
            self.waiting = {name: tensor.clone() for name, tensor in self.state().items()}
        for first in range(0, len(self.masters), SETTLED_AT_ONCE):
            end = min(first + SETTLED_AT_ONCE, len(self.masters))
            self.bring_up_to_date(torch.arange(first, end, device=self.masters.device))
        self.last_seen.zero_()
        self.missed.forget()

    def publish(self) -> None:
        """Round the masters into the weights that the model computes with."""
        if self.weight.dtype != torch.float32:
            self.weight.data.copy_(self.masters)

    def tensors(self) -> dict[str, Tensor]:
        """What AdamW has of every parameter, by kind."""
        return {"masters": self.masters, "exp_avg": self.moments[0], "exp_avg_sq": self.moments[1]}

    def state(self) -> dict[str, Tensor]:
        """All of it between two steps."""
        num = torch.tensor([self.missed.num])
        missed = {"kept": torch.from_numpy(self.missed.kept), "drift": torch.from_numpy(self.missed.drift)}
        return {**self.tensors(), "last_seen": self.last_seen, "num_missed": num, **missed}

    def wait_again(self, waiting: dict[str, Tensor]) -> None:
        """Be as before the settling that came out of turn."""
        for name, tensor in self.state().items():
            tensor.copy_(waiting[name])
        self.missed.num = int(waiting["num_missed"])
        self.publish()


def added_up(ids: Tensor, gradients: Tensor) -> Touched:
    """One gradient for each row, added in the order in which they come."""
    ids, order = ids.sort(stable=True)
    firsts = ids.diff(prepend=ids.new_tensor([-1])).nonzero()[:, 0]
    return ids[firsts], F.embedding_bag(order, gradients, firsts, mode="sum")
