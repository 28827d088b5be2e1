"""TextModel: text in, text out, on top of the engine; knows no files and no web.

An answer may outgrow the model's context: then the older half of the context is dropped and writing goes on from
the rest, so that small models write long texts. A prompt must fit.
"""

import threading
from collections import deque
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Items
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from smelt.configs import DecoderConfig
from smelt.data.chat import parse_messages, render_prompt, stop_strings
from smelt.data.tokenizers import StreamDecoder, Tokenizer
from smelt.errors import InvalidInput, TokenizerError
from smelt.inference.engine import Engine
from smelt.inference.sequence import Sequence, Status
from smelt.inference.stop_strings import StopStrings
from smelt.models.decoder import Decoder
from smelt.types import ChatMessage, FinishReason, SamplingParams


@dataclass(eq=False, slots=True)
class Answer:
    """One text being written: the sequence that runs for it now, and what is ready to be shown."""

    sequence: Sequence
    params: SamplingParams
    decoder: StreamDecoder
    stops: StopStrings
    num_tokens: int = 0
    pieces: deque[str] = field(default_factory=deque)
    finish_reason: FinishReason | None = None

    def take(self, token: int) -> None:
        """Turn a new token into text."""
        self.num_tokens += 1
        if token not in self.params.stop_token_ids:
            self.show(self.stops.push(self.decoder.push([token])))

    def close(self, reason: FinishReason) -> None:
        """Show what was held back, unless a stop string was found."""
        self.show(self.stops.push(self.decoder.finish()))
        self.show(self.stops.finish())
        self.finish_reason = "stop" if self.stops.found else reason

    def show(self, text: str) -> None:
        """Queue text for the reader."""
        if text:
            self.pieces.append(text)


class TextModel:
    """A model with its tokenizer. Threads may share one: their answers are computed together."""

    def __init__(self, model: Decoder, tokenizer: Tokenizer, num_slots: int = 8) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.engine = Engine(model, num_slots, tokenizer.vocab_size)
        self._answers: dict[Sequence, Answer] = {}
        self._lock = threading.Lock()

    @property
    def config(self) -> DecoderConfig:
        """The model's shape."""
        return self.model.config

    def generate(self, prompt: str = "", num_samples: int = 1, **sampling: Any) -> str | list[str]:
        """What the model writes after the prompt: a text, or a list where `num_samples` is more than 1.

        `sampling`: the fields of SamplingParams. An empty prompt starts from the end-of-text token.
        """
        texts = ["".join(stream) for stream in self.streams(prompt, num_samples, **sampling)]
        return texts[0] if num_samples == 1 else texts

    def stream(self, prompt: str = "", **sampling: Any) -> Iterator[str]:
        """Pieces of one answer as they are written; closing the iterator stops the work."""
        return self.streams(prompt, 1, **sampling)[0]

    def chat(self, messages: Items[ChatMessage | Mapping[str, str]], **sampling: Any) -> str:
        """The assistant's answer to a conversation of {role, content} messages."""
        turns = parse_messages([asdict(turn) if isinstance(turn, ChatMessage) else turn for turn in messages])
        stop = (*_as_tuple(sampling.pop("stop", ())), *stop_strings())
        return "".join(self.stream(render_prompt(turns), stop=stop, **sampling)).strip()

    def streams(self, prompt: str, num_samples: int, **sampling: Any) -> list[Iterator[str]]:
        """Several answers to one prompt, computed together whichever is read first. Sample i uses seed + i."""
        if num_samples < 1:
            raise InvalidInput(f"num_samples must be at least 1, not {num_samples}")
        prompt_ids, params = self._prompt_ids(prompt), self._params(sampling)
        seeds = [None if params.seed is None else params.seed + index for index in range(num_samples)]
        answers = [self._begin(prompt_ids, replace(params, seed=seed)) for seed in seeds]
        return [self._read(answer) for answer in answers]

    def _read(self, answer: Answer) -> Iterator[str]:
        try:
            while answer.pieces or answer.finish_reason is None:
                if not answer.pieces:
                    self._step()
                while answer.pieces:
                    yield answer.pieces.popleft()
        finally:
            self._abort(answer)

    def _prompt_ids(self, prompt: str) -> list[int]:
        """Without a prompt: the end of the text before, or a new line, or where there is neither the first token."""
        if prompt:
            return self.tokenizer.encode(prompt)
        if self._eot_id is not None:
            return [self._eot_id]
        try:
            return self.tokenizer.encode("\n")
        except TokenizerError:
            return [0]

    @property
    def _eot_id(self) -> int | None:
        """The end-of-text token, where the model has a row for it (vocabularies made elsewhere may not)."""
        eot_id = self.tokenizer.eot_id
        return eot_id if eot_id is not None and eot_id < self.config.vocab_size else None

    def _params(self, sampling: dict[str, Any]) -> SamplingParams:
        try:
            params = SamplingParams(**sampling)
        except TypeError:
            known = [setting.name for setting in fields(SamplingParams)]
            unknown = ", ".join(sorted(sampling.keys() - set(known)))
            raise InvalidInput(f"unknown sampling settings: {unknown}; known: {', '.join(known)}") from None
        ends = frozenset() if self._eot_id is None else frozenset({self._eot_id})
        return replace(params, stop=_as_tuple(params.stop), stop_token_ids=frozenset(params.stop_token_ids) | ends)

    def _begin(self, prompt_ids: list[int], params: SamplingParams) -> Answer:
        sequence = Sequence(prompt_ids, params)
        answer = Answer(sequence, params, StreamDecoder(self.tokenizer), StopStrings(params.stop))
        with self._lock:
            self.engine.add(sequence)
            self._answers[sequence] = answer
        return answer

    def _step(self) -> None:
        """One step of the engine; every answer, whoever reads it, gets its new text."""
        with self._lock:
            for sequence, token in self.engine.step():
                answer = self._answers[sequence]
                answer.take(token)
                if answer.stops.found:
                    self.engine.abort(sequence)
                if sequence.status is Status.FINISHED:
                    self._finish_or_continue(answer)

    def _finish_or_continue(self, answer: Answer) -> None:
        sequence = answer.sequence
        del self._answers[sequence]
        num_left = answer.params.max_tokens - answer.num_tokens
        if sequence.finish_reason != "length" or num_left <= 0:
            answer.close(sequence.finish_reason or "stop")
            return
        context = (sequence.prompt_ids + sequence.output_ids)[-max(1, self.config.block_size // 2) :]
        answer.sequence = Sequence(context, replace(answer.params, max_tokens=num_left))
        answer.sequence.random = sequence.random
        self.engine.add(answer.sequence)
        self._answers[answer.sequence] = answer

    def _abort(self, answer: Answer) -> None:
        with self._lock:
            if self._answers.pop(answer.sequence, None) is not None:
                self.engine.abort(answer.sequence)


def _as_tuple(stop: str | Items[str]) -> tuple[str, ...]:
    return (stop,) if isinstance(stop, str) else tuple(stop)
