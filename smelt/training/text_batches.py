"""Batches of labelled texts, for training and for evaluation; knows no model and no optimizer.

What is in a step's batch follows from seed and step alone, and each epoch has every text once. Within a batch the texts
are sorted by length and dealt out to the ranks in turn, so that their work is alike; nothing is padded.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch

from smelt.data.labelled import order_of
from smelt.models.batch import Batch
from smelt.models.classifier import pack_texts
from smelt.training.job import BatchSize
from smelt.training.parallel import Ranks

MAX_TOKENS = 16_384  # of one forward pass, so that long texts take no more memory than short ones


class TextBatches:
    """The batches of a run, of `num_texts` texts each but for the last of an epoch."""

    def __init__(
        self,
        texts: Sequence[Sequence[int]],
        labels: Sequence[int],
        ranks: Ranks,
        num_texts: int,
        micro_texts: int,
        seed: int,
    ) -> None:
        self.texts = texts
        self.labels = labels
        self.ranks = ranks
        self.num_texts = num_texts
        self.micro_texts = micro_texts
        self._order = lru_cache(maxsize=2)(lambda epoch: order_of(len(texts), seed, epoch))

    @property
    def steps_per_epoch(self) -> int:
        """How many batches an epoch has."""
        return -(-len(self.texts) // self.num_texts)

    def numbers(self, step: int) -> list[int]:
        """Numbers of the texts of a step's global batch, counted from 0."""
        epoch, batch = divmod(step, self.steps_per_epoch)
        numbers: list[int] = self._order(epoch)[batch * self.num_texts : (batch + 1) * self.num_texts]
        return numbers

    def size(self, step: int) -> BatchSize:
        """The size of a step's global batch."""
        numbers = self.numbers(step)
        return BatchSize(len(numbers), sum(len(self.texts[number]) for number in numbers), len(numbers))

    def micro_batches(self, step: int, device: torch.device, rank: int) -> Iterator[Batch]:
        """A rank's share of it, the longest texts first."""
        own = by_length(self.texts, self.numbers(step))[rank :: self.ranks.world_size]
        return packed(self.texts, self.labels, own, self.micro_texts, device)

    def describe(self, step: int) -> str:
        """Where to look when something is wrong with a batch."""
        return f"of the texts {', '.join(str(number + 1) for number in self.numbers(step)[:20])}"


def eval_batches(
    texts: Sequence[Sequence[int]], labels: Sequence[int], ranks: Ranks, num_texts: int, device: torch.device
) -> Iterator[Batch]:
    """This rank's share of all texts, sorted by length."""
    own = by_length(texts, range(len(texts)))[ranks.rank :: ranks.world_size]
    return packed(texts, labels, own, num_texts, device)


def by_length(texts: Sequence[Sequence[int]], numbers: Sequence[int]) -> list[int]:
    """The longest first; those of one length stay in their order."""
    return sorted(numbers, key=lambda number: -len(texts[number]))


def packed(
    texts: Sequence[Sequence[int]], labels: Sequence[int], numbers: Sequence[int], max_texts: int, device: torch.device
) -> Iterator[Batch]:
    """Batches of neighbours, of so many texts and MAX_TOKENS at most."""
    chosen: list[int] = []
    num_tokens = 0
    for number in numbers:
        if chosen and (len(chosen) == max_texts or num_tokens + len(texts[number]) > MAX_TOKENS):
            yield _packed(texts, labels, chosen, device)
            chosen, num_tokens = [], 0
        chosen.append(number)
        num_tokens += len(texts[number])
    if chosen:
        yield _packed(texts, labels, chosen, device)


def _packed(texts: Sequence[Sequence[int]], labels: Sequence[int], chosen: list[int], device: torch.device) -> Batch:
    return pack_texts([texts[number] for number in chosen], [labels[number] for number in chosen]).to(device)
