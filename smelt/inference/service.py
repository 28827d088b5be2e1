"""TextModel: text in, text out, on top of the engine; knows no files and no web.

An answer may outgrow the model's context: then the older half of the context is dropped and writing goes on from
the rest, so that small models write long texts. A prompt must fit.
"""

import threading
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Items
from dataclasses import asdict, fields, replace
from typing import Any

from smelt.configs import DecoderConfig
from smelt.data.chat import parse_messages, render_prompt, stop_strings
from smelt.data.tokenizers import StreamDecoder, Tokenizer
from smelt.errors import InvalidInput, TokenizerError
from smelt.inference.answer import Answer
from smelt.inference.engine import Engine
from smelt.inference.sequence import Sequence, Status
from smelt.inference.stop_strings import StopStrings
from smelt.inference.whitespace import OuterSpace
from smelt.models.decoder import Decoder
from smelt.types import ChatMessage, SamplingParams


class TextModel:
    """A model with its tokenizer. Threads may share one: their answers are computed together.

    `generate`, `stream`, `streams` and `chat` are for whoever wants a text. They stand on `answer_to` or
    `answer_to_chat`, `begin`, `step` and `abort`, from which a server makes its own loop.
    """

    def __init__(self, model: Decoder, tokenizer: Tokenizer, num_slots: int = 8) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.engine = Engine(model, tokenizer.vocab_size, max_running=num_slots)
        self._answers: dict[Sequence, Answer] = {}
        self._lock = threading.Lock()

    @property
    def config(self) -> DecoderConfig:
        """The model's shape."""
        return self.model.config

    @property
    def answers(self) -> list[Answer]:
        """Those that have begun and not ended, oldest first."""
        return list(self._answers.values())

    @property
    def num_free(self) -> int:
        """How many more answers would be computed at once."""
        return self.engine.scheduler.max_running - len(self._answers)

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
        answer = self.answer_to_chat(turns, _params(sampling))
        self.begin(answer)
        return "".join(self._read(answer))

    def streams(self, prompt: str, num_samples: int, **sampling: Any) -> list[Iterator[str]]:
        """Several answers to one prompt, computed together whichever is read first. Sample i uses seed + i."""
        if num_samples < 1:
            raise InvalidInput(f"num_samples must be at least 1, not {num_samples}")
        prompt_ids, params = self._prompt_ids(prompt), _params(sampling)
        seeds = [None if params.seed is None else params.seed + index for index in range(num_samples)]
        answers = [self.answer_to(prompt_ids, replace(params, seed=seed)) for seed in seeds]
        for answer in answers:
            self.begin(answer)
        return [self._read(answer) for answer in answers]

    def answer_to(self, prompt: str | Items[int], params: SamplingParams, trims: bool = False) -> Answer:
        """An answer to a text or to token ids, to be begun; `trims` takes the white space around it away."""
        params = replace(params, stop_token_ids=params.stop_token_ids | self._end_ids())
        prompt_ids = self._prompt_ids(prompt) if isinstance(prompt, str) else list(prompt)
        decoder, stops = StreamDecoder(self.tokenizer), StopStrings(params.stop)
        return Answer(Sequence(prompt_ids, params), params, decoder, stops, OuterSpace(trims), len(prompt_ids))

    def answer_to_chat(self, messages: Items[ChatMessage], params: SamplingParams) -> Answer:
        """The assistant's next turn in a conversation, to be begun."""
        params = replace(params, stop=(*params.stop, *stop_strings()))
        return self.answer_to(render_prompt(messages), params, trims=True)

    def begin(self, answer: Answer) -> None:
        """Let the next steps write it. InvalidInput where the model or the engine cannot."""
        with self._lock:
            self._run(answer, answer.sequence)

    def step(self) -> list[Answer]:
        """Draw one token for as many answers as there is room for; those that have news."""
        with self._lock:
            stepped = [(self._answers[sequence], token) for sequence, token in self.engine.step()]
            for answer, token in stepped:
                answer.take(token)
                if answer.stops.found:
                    self.engine.abort(answer.sequence)
                if answer.sequence.status is Status.FINISHED:
                    self._finish_or_continue(answer)
            return [answer for answer, _ in stepped]

    def abort(self, answer: Answer) -> None:
        """Stop an answer and free its slot; one that has ended stays as it is."""
        with self._lock:
            if self._answers.pop(answer.sequence, None) is not None:
                self.engine.abort(answer.sequence)
                answer.finish_reason = "aborted"

    def restart(self) -> None:
        """Forget all that runs, after a step that failed half-way; an answer goes on once it is resumed."""
        with self._lock:
            self._answers.clear()
            self.engine = Engine(
                self.model, self.engine.vocab_size, max_running=self.engine.scheduler.max_running
            )

    def resume(self, answer: Answer) -> None:
        """Go on with an answer where it stood before `restart`: to the same text."""
        with self._lock:
            sequence = answer.sequence
            context = sequence.prompt_ids + sequence.output_ids
            self._run(answer, sequence.resumed(context, answer.num_left))

    def _run(self, answer: Answer, sequence: Sequence) -> None:
        self.engine.add(sequence)
        answer.sequence = sequence
        self._answers[sequence] = answer

    def _finish_or_continue(self, answer: Answer) -> None:
        sequence = answer.sequence
        del self._answers[sequence]
        if sequence.finish_reason != "length" or answer.num_left <= 0:
            answer.close(sequence.finish_reason or "stop")
            return
        context = (sequence.prompt_ids + sequence.output_ids)[-max(1, self.config.block_size // 2) :]
        self._run(answer, sequence.resumed(context, answer.num_left))

    def _read(self, answer: Answer) -> Iterator[str]:
        try:
            while True:
                with self._lock:  # another thread's step may be writing it
                    (text, _), has_ended = answer.news(), answer.finish_reason is not None
                if text:
                    yield text
                if has_ended:
                    return
                if not text:
                    self.step()
        finally:
            self.abort(answer)

    def _prompt_ids(self, prompt: str) -> list[int]:
        """Without a prompt: the end of the text before, or a new line, or where there is neither the first token."""
        if prompt:
            return self.tokenizer.encode(prompt)
        if ends := self._end_ids():
            return list(ends)
        try:
            return self.tokenizer.encode("\n")
        except TokenizerError:
            return [0]

    def _end_ids(self) -> frozenset[int]:
        """The end-of-text token, where the model has a row for it (vocabularies made elsewhere may not)."""
        eot_id = self.tokenizer.eot_id
        return frozenset() if eot_id is None or eot_id >= self.config.vocab_size else frozenset({eot_id})


def _params(sampling: dict[str, Any]) -> SamplingParams:
    try:
        params = SamplingParams(**sampling)
    except TypeError:
        known = [setting.name for setting in fields(SamplingParams)]
        unknown = ", ".join(sorted(sampling.keys() - set(known)))
        raise InvalidInput(f"unknown sampling settings: {unknown}; known: {', '.join(known)}") from None
    stop: str | Items[str] = params.stop
    stop = (stop,) if isinstance(stop, str) else tuple(stop)
    return replace(params, stop=stop, stop_token_ids=frozenset(params.stop_token_ids))
