"""Sampling: raw tokens drawn from a model or one of its adapters, for whoever trains; knows no text and no wire.

Told all at once when the last of them has ended: tokens with their log-probabilities, stop tokens among them, and how
likely the prompt was.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from smelt.errors import InvalidInput
from smelt.inference.answer import Answer
from smelt.inference.events import End, Event, SampledTokens, SampleRequest, Samples
from smelt.inference.sequence import PromptWishes
from smelt.inference.service import TextModel
from smelt.models.adapter_folders import Adapter, read_adapter


@dataclass(eq=False, slots=True)
class Sampling:
    """The samples after one prompt. The adapter of that name is read from `folder` unless the engine has it."""

    key: str
    request: SampleRequest
    owner: str
    adapter: str | None = None
    folder: Path | None = None
    answers: list[Answer] = field(default_factory=list)
    num_ended: int = 0
    has_begun: bool = False
    is_long: bool = False
    _weights: Adapter | None = None
    _wishes: PromptWishes | None = None

    @property
    def has_ended(self) -> bool:
        """Whether all of its answers have."""
        return self.num_ended == len(self.answers)

    def prepare(self, model: TextModel) -> None:
        """Read the adapter if need be. NotFound, UnsupportedModel or InvalidInput say what is wrong."""
        if self.adapter is not None and self.folder is not None and self.adapter not in model.engine.adapters.names:
            self._weights = read_adapter(self.folder, model.config)
        request = self.request
        self._wishes = _wishes_of(request)
        self.answers = model.samples_of(
            request.prompt_ids,
            request.params,
            request.num_samples,
            owner=self.owner,
            adapter=self.adapter,
            wishes=self._wishes,
        )

    def bring_adapter(self, model: TextModel) -> None:
        """To be called on the engine's thread, before its answers are begun."""
        if self.adapter is not None and self.folder is not None and self.adapter not in model.engine.adapters.names:
            # It may have had to make way since.
            model.keep_adapter(self.adapter, self._weights or read_adapter(self.folder, model.config))
        self._weights = None

    def events_of(self, answer: Answer) -> list[Event]:
        """All that was drawn, once it is."""
        self.has_begun = True
        self.num_ended += answer.finish_reason is not None
        if not self.has_ended:
            return []
        first = self.answers[0].sequence
        num_cached = first.num_cached_tokens
        drawn = tuple(map(_drawn, self.answers))
        samples = Samples(
            self.key,
            self.request,
            drawn,
            tuple(first.prompt_logprobs),
            tuple(first.prompt_top_logprobs),
            num_cached,
            self._wishes,
        )
        num_tokens = sum(len(each.token_ids) for each in drawn)
        return [samples, End(self.key, "stop", len(first.prompt_ids), num_tokens, num_cached_tokens=num_cached)]

    def aborted(self, error: Exception | None = None) -> End:
        """Its end without samples."""
        return End(self.key, "aborted", len(self.request.prompt_ids), error=error)


@dataclass(eq=False, slots=True)
class Holding:
    """Somebody works with a model beside the answers: it comes, or cannot, and must not leave before it is released.

    `leave`: others want it gone; what is done with it must end now.
    """

    key: str
    come: Callable[[TextModel], None]
    refused: Callable[[Exception], None]
    leave: Callable[[], None]
    has_begun: bool = True

    def aborted(self, error: Exception | None = None) -> End:
        """Nobody listens for it."""
        return End(self.key, "aborted", error=error)


def _wishes_of(request: SampleRequest) -> PromptWishes | None:
    num_places = len(request.prompt_ids) - 1
    targets: NDArray[np.int64] | None = None
    if request.num_targets:
        targets = np.array(request.target_ids, np.int64).reshape(-1, request.num_targets)
        if len(targets) != num_places:
            raise InvalidInput(f"there are targets for {len(targets)} places, and the prompt has {num_places}")
    if targets is None and not request.num_alternatives:
        return None
    return PromptWishes(targets, request.num_alternatives, request.params.seed or 0)


def _drawn(answer: Answer) -> SampledTokens:
    sequence = answer.sequence
    return SampledTokens(
        tuple(sequence.output_ids),
        tuple(sequence.logprobs),
        tuple(sequence.top_logprobs),
        has_stopped=answer.finish_reason == "stop",
    )
