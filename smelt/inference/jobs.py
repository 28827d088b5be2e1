"""Jobs: what an InferenceServer was asked for and has not ended; knows no threads and no other jobs.

A job is prepared beside the server's thread (text becomes tokens there), and then gives events until its End.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from smelt.data.chat_training import examples_data
from smelt.errors import InvalidInput, SmeltError, Unavailable
from smelt.inference.answer import Answer
from smelt.inference.classifier import Classifying, TextClassifier
from smelt.inference.embeddings import Slice, embed_in_slices
from smelt.inference.events import (
    EmbedRequest,
    End,
    Event,
    Piece,
    RenderedData,
    RenderRequest,
    Request,
    Vectors,
)
from smelt.inference.prompts import LONG_TEXT
from smelt.inference.sample_jobs import Holding, Sampling
from smelt.inference.service import TextModel
from smelt.models.adapter_folders import Adapter, adapter_stamp, read_adapter
from smelt.types import Datum

log = logging.getLogger(__name__)


@dataclass(eq=False, slots=True)
class Writing:
    """The answers to one prompt. Where the likeliest of more are asked for, nothing is told before all are whole."""

    key: str
    request: Request
    home: Path | None = None
    answers: list[Answer] = field(default_factory=list)
    num_ended: int = 0
    has_begun: bool = False
    _adapter: tuple[str, Path, Adapter | None] | None = None  # its name in the engine, its folder, and what is there

    @property
    def is_long(self) -> bool:
        """Whether others should not wait for its encoding; a grammar may take a second too."""
        request = self.request
        num_chars = sum(len(message.content) for message in request.messages)
        num_chars += len(request.prompt) if isinstance(request.prompt, str) else 0
        return num_chars > LONG_TEXT or request.params.grammar is not None

    @property
    def has_ended(self) -> bool:
        """Whether all of its answers have, and `events_of` has heard of it."""
        return self.num_ended == len(self.answers)

    def prepare(self, model: TextModel) -> None:
        """Turn the prompt into tokens, once for all answers."""
        request = self.request
        num_answers = max(request.num_samples, request.best_of)
        if request.messages:
            tools, must_call = request.tools, request.must_call
            answers_to = partial(model.answers_to_chat, request.messages, tools=tools, must_call=must_call)
        else:
            answers_to = partial(model.answers_to, request.prompt, echo=request.echo)
        adapter = self._read_adapter(model)
        self.answers = answers_to(request.params, num_answers, owner=request.owner, adapter=adapter)
        for answer in self.answers:
            answer.sequence.is_live = request.is_live

    def bring_adapter(self, model: TextModel) -> None:
        """To be called on the engine's thread, before its answers are begun."""
        if self._adapter is None:
            return
        name, folder, adapter = self._adapter
        if name not in model.engine.adapters.names:  # it may have had to make way since it was looked for
            model.keep_adapter(name, adapter or read_adapter(folder, model.config))
        self._adapter = None

    def _read_adapter(self, model: TextModel) -> str | None:
        """The name by which the engine knows, or will know, the adapter of a folder as it is now."""
        name = self.request.adapter
        if name is None or self.home is None or name in model.engine.adapters.names:
            return name
        folder = self.home / name
        stamped = f"{name}@{adapter_stamp(folder)}"
        is_there = stamped in model.engine.adapters.names
        self._adapter = stamped, folder, None if is_there else read_adapter(folder, model.config)
        return stamped

    def events_of(self, answer: Answer) -> list[Event]:
        """What to tell after a step that went on with this answer."""
        self.has_begun = True
        self.num_ended += answer.finish_reason is not None
        if self.request.best_of <= self.request.num_samples:
            return self._tell(answer, self.answers.index(answer))
        if not self.has_ended:
            return []
        likeliest = sorted(self.answers, key=lambda answer: -answer.mean_logprob)[: self.request.num_samples]
        return [event for index, answer in enumerate(likeliest) for event in self._tell(answer, index)]

    def aborted(self, error: Exception | None = None) -> End:
        """The end of all that has not ended."""
        num_tokens = sum(answer.num_tokens for answer in self.answers)
        num_prompt = self.answers[0].num_prompt_tokens if self.answers else 0
        return End(self.key, "aborted", num_prompt, num_tokens, error)

    def _tell(self, answer: Answer, index: int) -> list[Event]:
        news = answer.news()
        piece = Piece(self.key, news.text, news.token_ids, index, news.logprobs)
        if answer.finish_reason is None:
            return [piece]
        end = End(
            self.key,
            answer.finish_reason,
            answer.num_prompt_tokens,
            answer.num_tokens,
            index=index,
            num_cached_tokens=self.answers[0].num_cached_tokens,
            tool_calls=answer.tool_calls,
        )
        return [piece, end]


@dataclass(eq=False, slots=True)
class Embedding:
    """Texts on their way to vectors, a slice of work at a time."""

    key: str
    request: EmbedRequest
    num_tokens: int = 0
    has_begun: bool = False
    _vectors_NC: NDArray[np.float32] = field(default_factory=lambda: np.empty((0, 0), np.float32))
    _slices: Iterator[Slice] = iter(())

    @property
    def is_long(self) -> bool:
        """Whether others should not wait for its encoding."""
        return sum(map(len, self.request.inputs)) > LONG_TEXT

    def prepare(self, model: TextModel) -> None:
        """Turn the texts into tokens."""
        inputs = model.encode_inputs(self.request.inputs)
        self.num_tokens = sum(map(len, inputs))
        self._vectors_NC = np.empty((len(inputs), model.config.n_embd), "<f4")
        self._slices = embed_in_slices(model.model, inputs)

    def step(self) -> list[Event]:
        """Do one slice; the vectors once all are there."""
        self.has_begun = True
        finished = next(self._slices, None)
        if finished is None:
            vectors = Vectors(self.key, self._vectors_NC.tobytes(), self._vectors_NC.shape[1])
            return [vectors, End(self.key, "stop", self.num_tokens)]
        for number, vector in finished:
            self._vectors_NC[number] = vector.cpu().numpy()
        return []

    def aborted(self, error: Exception | None = None) -> End:
        """Its end without vectors."""
        return End(self.key, "aborted", self.num_tokens, error=error)


@dataclass(eq=False, slots=True)
class Rendering:
    """Conversations on their way to data to train on: all of the work is done beside the server's thread."""

    key: str
    request: RenderRequest
    data: list[Datum] = field(default_factory=list)
    has_begun: bool = False

    def prepare(self, model: TextModel) -> None:
        """Render them. InvalidInput says which one cannot be."""
        config = model.config
        self.data = examples_data(model.chat_format, self.request.examples, config.block_size, config.vocab_size)

    def events(self) -> list[Event]:
        """What to tell once it is prepared."""
        return [RenderedData(self.key, self.data), End(self.key, "stop")]

    def aborted(self, error: Exception | None = None) -> End:
        """Its end without data."""
        return End(self.key, "aborted", error=error)


@dataclass(eq=False, slots=True)
class Loading:
    """Somebody waits for a model to be ready."""

    key: str
    has_begun: bool = False

    def aborted(self, error: Exception | None = None) -> End:
        """Its end without a model."""
        return End(self.key, "aborted", error=error)


Job: TypeAlias = Writing | Sampling | Embedding | Rendering | Classifying | Loading | Holding


def mismatch(job: Job, name: str, model: TextModel | TextClassifier) -> InvalidInput | None:
    """What is wrong where a model is asked for what it cannot do: to write as a classifier, or the other way round."""
    if isinstance(job, Classifying) == isinstance(model, TextClassifier) or isinstance(job, Loading):
        return None
    if isinstance(job, Classifying):
        return InvalidInput(f"{name} writes text and has no labels; ask a classifier", "model")
    return InvalidInput(f"{name} is a classifier, which writes no text; ask it by POST /predict", "model")


def explained(error: BaseException, key: str) -> Exception:
    """What to tell of an error. Memory that is short is not a bug, and may be there again in a moment."""
    if not isinstance(error, SmeltError):
        log.error("request %s failed", key, exc_info=error)
    words = ("out of memory", "allocate memory")
    if isinstance(error, MemoryError) or any(word in str(error) for word in words):
        return Unavailable("there is not enough memory for this now; ask for less, or try again", retry_after_s=10)
    return error if isinstance(error, Exception) else RuntimeError(type(error).__name__)
