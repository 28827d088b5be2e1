"""Job: all that the loop needs of a recipe, and what it may ask of its batches; knows no recipe, and takes no step."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from smelt.run_configs import RunConfig
from smelt.training.checkpoint import Checkpoints, TrainState
from smelt.training.losses import Loss
from smelt.training.metrics import Sink
from smelt.training.optim import Optimizer
from smelt.training.parallel import Ranks
from smelt.training.step import measure


@dataclass(frozen=True, slots=True)
class BatchSize:
    """What the batch of one step holds, over all ranks."""

    num_targets: int  # the step's loss is the mean over these
    num_tokens: int  # that go through the model
    num_samples: int | None = None  # None where a row is no thing of its own, as in running text


class TrainBatches(Protocol):
    """The batches of a run, each a function of its step (counted from 0) and of the rank alone."""

    def size(self, step: int) -> BatchSize:
        """The size of a step's global batch."""
        ...

    def micro_batches(self, step: int, device: torch.device, rank: int) -> Iterator[Any]:
        """A rank's share of it, in pieces as the job's loss takes them. The first rank has the most."""
        ...

    def describe(self, step: int) -> str:
        """Where to look when something is wrong with this rank's share."""
        ...


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What came of an evaluation, over all ranks."""

    loss: float  # mean over the targets
    num_targets: int
    figures: dict[str, float] = field(default_factory=dict)  # such as the accuracy


Evaluate = Callable[[int | None], Evaluation]  # over so many batches, shared by the ranks; None: over all there are


@dataclass
class Job:
    """All that a loop needs, made by a recipe."""

    config: RunConfig
    num_steps: int  # at which the run is done
    learning_rate: Callable[[int], float]  # of a step, counted from 0
    model: nn.Module
    has_dropout: bool
    optimizer: Optimizer
    loss: Loss
    train_batches: TrainBatches
    evaluate: Evaluate | None  # None where nothing is kept for it
    eval_interval: int  # steps between evaluations, after which the run is saved
    final_eval_batches: int | None  # of the evaluation at the end
    checkpoints: Checkpoints
    state: TrainState
    ranks: Ranks
    device: torch.device
    dtype: torch.dtype
    sinks: list[Sink]
    flops_per_token: float | None = None  # of forward and backward, where it is known
    patience: int | None = None  # evaluations in a row without a better one, after which the run ends
    figures: tuple[str, ...] = ()  # which metrics of the loss, each a sum over the targets, are shown as means


def evaluate_batches(
    model: nn.Module,
    loss: Loss,
    batches_of: Callable[[int], Iterable[Any]],
    ranks: Ranks,
    device: torch.device,
    figures: tuple[str, ...] = (),
) -> Evaluation:
    """The mean loss over the batches of all ranks, and the means of those of its metrics that are sums over targets.

    `batches_of` gives those of a rank.
    """
    sums = torch.zeros(2 + len(figures), dtype=torch.float64)
    for batch, counts in ranks.passes(batches_of):
        value = measure(model, batch, loss)
        if not counts:
            continue
        shown = [float(value.metrics[name]) for name in figures]
        sums += torch.tensor([float(value.total), value.num_targets, *shown], dtype=torch.float64)
    total, num_targets, *shown = ranks.sum_(sums.to(reducible(device))).tolist()
    means = {name: value / num_targets for name, value in zip(figures, shown, strict=True)}
    return Evaluation(total / num_targets, int(num_targets), means)


def reducible(device: torch.device) -> torch.device:
    """Where a tensor must lie for the ranks to add it."""
    return device if device.type == "cuda" else torch.device("cpu")
