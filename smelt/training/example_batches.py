"""Batches of examples: sequences one after the other in one row, without padding; knows no model and no recipe."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from smelt.data.labelled import order_of
from smelt.data.training_examples import Sample
from smelt.models.batch import Batch
from smelt.training.job import BatchSize
from smelt.training.parallel import Ranks

MAX_TOLD = 8  # examples that a message names


@dataclass(frozen=True, slots=True)
class ExampleBatch:
    """S sequences of N tokens together, of which L positions are learned. Of a preference the better one is first."""

    row: Batch  # (1, N), with positions
    lengths: tuple[int, ...]  # of the sequences, in the order of the row
    counted: Tensor  # (L,) int64: positions in the row
    targets: Tensor  # (L,) int64
    weights: Tensor  # (L,)
    sequence_ids: Tensor  # (L,) int64: 2 x preference + 1 for the worse answer; else the number of the sequence
    references: Tensor | None  # (S/2, 2) log p of preferences' answers, by the model that the run began with
    num_targets: int  # the loss is a mean over these: learned tokens, or preferences


def example_batch(samples: Sequence[Sample], device: torch.device, references: Tensor | None = None) -> ExampleBatch:
    """The samples as one row, the shortest sequence first: so those side by side are of similar length."""
    sequences = [
        (2 * number + side if len(sample.data) == 2 else number, datum)
        for number, sample in enumerate(samples)
        for side, datum in enumerate(sample.data)
    ]
    sequences.sort(key=lambda each: len(each[1].tokens))
    lengths = tuple(len(datum.tokens) for _, datum in sequences)
    weights = np.concatenate([datum.inputs["weights"] for _, datum in sequences])
    counted = np.flatnonzero(weights)
    targets = np.concatenate([datum.inputs["target_tokens"] for _, datum in sequences])
    ids = np.repeat([number for number, _ in sequences], lengths)

    def moved(array: NDArray[np.int64] | NDArray[np.float32]) -> Tensor:
        return torch.from_numpy(array).to(device, non_blocking=True)

    tokens = np.concatenate([datum.tokens for _, datum in sequences]).astype(np.int64)
    positions = np.concatenate([np.arange(length) for length in lengths])
    return ExampleBatch(
        row=Batch(moved(tokens)[None], positions=moved(positions)[None]),
        lengths=lengths,
        counted=moved(counted),
        targets=moved(targets[counted].astype(np.int64)),
        weights=moved(weights[counted]),
        sequence_ids=moved(ids[counted]),
        references=references,
        num_targets=len(samples) if len(samples[0].data) == 2 else len(counted),
    )


class ExampleBatches:
    """Every example once in each epoch, in an order that depends on the seed and the epoch alone, shared by the ranks.

    Each rank takes every so-manieth of a step's examples by length, so that all have about as much to do.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        ranks: Ranks,
        num_rows: int,
        micro_rows: int,
        seed: int,
        references: Tensor | None = None,
    ) -> None:
        self.samples = samples
        self.ranks = ranks
        self.num_rows = num_rows  # of the global batch
        self.micro_rows = micro_rows
        self.seed = seed
        self.references = references  # (number of samples, 2), for preferences
        self._orders: dict[int, list[int]] = {}

    def numbers(self, step: int) -> list[int]:
        """The examples of a step's global batch, the shortest first. A step may reach into the next epoch."""
        first = step * self.num_rows
        numbers = [self._number(place) for place in range(first, first + self.num_rows)]
        return sorted(numbers, key=lambda number: (self.samples[number].num_tokens, number))

    def _number(self, place: int) -> int:
        epoch, slot = divmod(place, len(self.samples))
        if epoch not in self._orders:
            self._orders = {e: order for e, order in self._orders.items() if e == epoch - 1}
            self._orders[epoch] = order_of(len(self.samples), self.seed, epoch)
        return self._orders[epoch][slot]

    def size(self, step: int) -> BatchSize:
        """Of the global batch."""
        own = [self.samples[number] for number in self.numbers(step)]
        is_preference = len(own[0].data) == 2
        return BatchSize(
            num_targets=len(own) if is_preference else sum(sample.num_targets for sample in own),
            num_tokens=sum(sample.num_tokens for sample in own),
            num_samples=len(own),
        )

    def micro_batches(self, step: int, device: torch.device, rank: int) -> Iterator[ExampleBatch]:
        """A rank's share of a step's global batch, `micro_rows` examples at a time."""
        own = self.numbers(step)[rank :: self.ranks.world_size]
        yield from _batches(self.samples, own, self.micro_rows, device, self.references)

    def describe(self, step: int) -> str:
        """Where this rank's first examples of a step stand."""
        own = self.numbers(step)[self.ranks.rank :: self.ranks.world_size]
        told = "; ".join(self.samples[number].where for number in own[:MAX_TOLD])
        return f"with the examples {told}{' and others' if len(own) > MAX_TOLD else ''}"


class ExampleEvaluation:
    """The same examples at every evaluation, evenly spread, shared by the ranks."""

    def __init__(
        self, samples: Sequence[Sample], ranks: Ranks, micro_rows: int, references: Tensor | None = None
    ) -> None:
        self.samples = samples
        self.ranks = ranks
        self.micro_rows = micro_rows
        self.references = references

    def batches(self, max_batches: int | None, device: torch.device, rank: int) -> Iterator[ExampleBatch]:
        """A rank's share of up to max_batches; None: of all."""
        num = len(self.samples) if max_batches is None else min(len(self.samples), max_batches * self.micro_rows)
        chosen = np.unique(np.linspace(0, len(self.samples) - 1, num).round().astype(np.int64)).tolist()
        chosen.sort(key=lambda number: (self.samples[number].num_tokens, number))
        own = chosen[rank :: self.ranks.world_size]
        yield from _batches(self.samples, own, self.micro_rows, device, self.references)


def _batches(
    samples: Sequence[Sample], numbers: list[int], rows: int, device: torch.device, references: Tensor | None
) -> Iterator[ExampleBatch]:
    for first in range(0, len(numbers), rows):
        part = numbers[first : first + rows]
        own = None if references is None else references[torch.tensor(part)].to(device)
        yield example_batch([samples[number] for number in part], device, own)
