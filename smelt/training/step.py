"""The one place that computes gradients; knows no task, no optimizer and no schedule."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from smelt.models.batch import Batch
from smelt.training.losses import Loss, Metrics


@dataclass(frozen=True, slots=True)
class LossValue:
    """A sum over `num_targets` targets, and figures to report; nothing here holds on to a graph."""

    total: Tensor  # ()
    num_targets: int
    metrics: Metrics


def step(model: nn.Module, batch: Batch, loss: Loss, scale: float = 1.0) -> LossValue:
    """Add the gradient of `scale` x loss to the model's gradients; returns the value without the scale."""
    total, metrics = loss(model, batch)
    torch.autograd.backward(total * scale)
    return _detached(total, metrics, batch)


@torch.no_grad()
def measure(model: nn.Module, batch: Batch, loss: Loss) -> LossValue:
    """The loss without gradients and without dropout."""
    was_training = model.training
    model.eval()
    total, metrics = loss(model, batch)
    model.train(was_training)
    return _detached(total, metrics, batch)


def _detached(total: Tensor, metrics: Metrics, batch: Batch) -> LossValue:
    return LossValue(total.detach(), batch.num_targets, {name: value.detach() for name, value in metrics.items()})
