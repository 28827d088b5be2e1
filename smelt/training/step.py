"""The one place that computes gradients; knows no task, no optimizer and no schedule."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from smelt.training.losses import Loss, Metrics


class Counted(Protocol):
    """A batch of whatever its loss and its model take."""

    @property
    def num_targets(self) -> int:
        """How many things carry a loss: tokens, or samples."""
        ...


@dataclass(frozen=True, slots=True)
class LossValue:
    """A sum over `num_targets` targets, and figures to report; nothing here holds on to a graph."""

    total: Tensor  # ()
    num_targets: int
    metrics: Metrics


def step(model: nn.Module, batch: Counted, loss: Loss, scale: float = 1.0) -> LossValue:
    """Add the gradient of `scale` x loss to the model's gradients; returns the value without the scale."""
    total, metrics = loss(model, batch)
    torch.autograd.backward(total * scale)
    return _detached(total, metrics, batch)


@torch.no_grad()
def measure(model: nn.Module, batch: Counted, loss: Loss) -> LossValue:
    """The loss without gradients and without dropout."""
    was_training = model.training
    model.eval()
    total, metrics = loss(model, batch)
    model.train(was_training)
    return _detached(total, metrics, batch)


def _detached(total: Tensor, metrics: Metrics, batch: Counted) -> LossValue:
    return LossValue(total.detach(), batch.num_targets, {name: value.detach() for name, value in metrics.items()})
