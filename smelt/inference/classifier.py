"""TextClassifier: a classifier with its tokenizer, and texts on their way to probabilities; knows no threads.

Texts of different requests are computed together, those of similar length side by side, a slice of work at a time.
"""

from collections.abc import Iterable
from collections.abc import Sequence as Items
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from smelt.data.text_ids import TextIds
from smelt.inference.events import ClassifyRequest, End, Event, Scores
from smelt.inference.prompts import LONG_TEXT
from smelt.models.classifier import Classifier, pack_texts

SLICE_TOKENS = 2048  # of one forward pass: a few tenths of a second of a large encoder on two cores


class TextClassifier:
    """A model that says which label a text has."""

    def __init__(self, model: Classifier, text_ids: TextIds) -> None:
        self.model = model
        self.text_ids = text_ids

    @property
    def labels(self) -> tuple[str, ...]:
        """What a text can be."""
        return self.model.config.labels

    def classify(self, texts: Items[str]) -> list[dict[str, float]]:
        """The probability of every label for each text."""
        job = Classifying("", ClassifyRequest(texts=tuple(texts)))
        job.prepare(self)
        while not job.is_done:
            classify_slice(self, [job])
        return [dict(zip(self.labels, row, strict=True)) for row in job.probabilities.tolist()]

    @torch.inference_mode()
    def probabilities(self, texts: Items[Items[int]]) -> NDArray[np.float32]:
        """(B, L) of texts as token ids, in one forward pass."""
        device = self.model.out.weight.device
        order = sorted(range(len(texts)), key=lambda number: len(texts[number]))
        logits_BL = self.model(pack_texts([texts[number] for number in order]).to(device))
        found = logits_BL.float().softmax(dim=-1).cpu().numpy()
        probabilities = np.empty_like(found)
        probabilities[order] = found
        return probabilities


@dataclass(eq=False, slots=True)
class Classifying:
    """Texts on their way to probabilities."""

    key: str
    request: ClassifyRequest
    num_tokens: int = 0
    has_begun: bool = False
    num_done: int = 0
    ids: list[list[int]] = field(default_factory=list)
    labels: tuple[str, ...] = ()
    probabilities: NDArray[np.float32] = field(default_factory=lambda: np.empty((0, 0), np.float32))

    @property
    def is_long(self) -> bool:
        """Whether others should not wait for its encoding."""
        return sum(map(len, self.request.texts)) > LONG_TEXT

    @property
    def is_done(self) -> bool:
        """Whether all probabilities are there."""
        return self.num_done == len(self.ids)

    @property
    def num_tokens_left(self) -> int:
        """Of the texts that have no probabilities yet."""
        return sum(map(len, self.ids[self.num_done :]))

    def prepare(self, model: TextClassifier) -> None:
        """Turn the texts into tokens."""
        self.ids = model.text_ids.encode(self.request.texts)
        self.num_tokens = sum(map(len, self.ids))
        self.labels = model.labels
        self.probabilities = np.empty((len(self.ids), len(model.labels)), "<f4")

    def events(self) -> list[Event]:
        """What to tell once it is done."""
        return [Scores(self.key, self.labels, self.probabilities.tobytes()), End(self.key, "stop", self.num_tokens)]

    def aborted(self, error: Exception | None = None) -> End:
        """Its end without probabilities."""
        return End(self.key, "aborted", self.num_tokens, error=error)


def fill_slice(jobs: Iterable[Classifying]) -> bool:
    """Whether the next pass would be no larger if there were more."""
    return sum(job.num_tokens_left for job in jobs) >= SLICE_TOKENS


def classify_slice(model: TextClassifier, jobs: Iterable[Classifying]) -> list[Classifying]:
    """One forward pass over the next texts of these jobs, the first ones first; the jobs that it has gone on with."""
    chosen: list[tuple[Classifying, list[int]]] = []
    num_tokens = 0
    for job in jobs:
        numbers = []
        for number in range(job.num_done, len(job.ids)):
            if num_tokens and num_tokens + len(job.ids[number]) > SLICE_TOKENS:
                break
            numbers.append(number)
            num_tokens += len(job.ids[number])
        if numbers:
            chosen.append((job, numbers))
        if num_tokens >= SLICE_TOKENS:
            break
    found = model.probabilities([job.ids[number] for job, numbers in chosen for number in numbers])
    for job, numbers in chosen:
        job.has_begun = True
        job.probabilities[numbers], found = found[: len(numbers)], found[len(numbers) :]
        job.num_done += len(numbers)
    return [job for job, _ in chosen]
