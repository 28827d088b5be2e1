"""TextModel: text in, text out, on top of the engine; knows no files and no web.

An answer may outgrow the model's context: then the older half of the context is dropped and writing goes on from
the rest, so that small models write long texts. A prompt must fit.
"""

import threading
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Items
from dataclasses import asdict, fields, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from smelt.configs import DecoderConfig
from smelt.data.chat import parse_messages
from smelt.data.chat_format import ChatFormat
from smelt.data.tokenizers import StreamDecoder, Tokenizer
from smelt.data.tool_calls import JSON_CALL, ToolCallStream
from smelt.errors import InvalidInput, SmeltError
from smelt.inference.answer import Answer
from smelt.inference.embeddings import check_inputs, embed_in_slices, join_vectors
from smelt.inference.engine import MAX_RUNNING, Engine
from smelt.inference.grammar import GrammarCompiler
from smelt.inference.interrupts import interrupts_deferred
from smelt.inference.prompts import Prompts
from smelt.inference.sequence import PromptWishes, Sequence, Status
from smelt.inference.stop_strings import StopStrings
from smelt.inference.whitespace import OuterSpace
from smelt.models.adapter_folders import Adapter
from smelt.models.decoder import Decoder
from smelt.types import LOCAL_OWNER, ChatMessage, SamplingParams


class TextModel:
    """A model with its tokenizer. Threads may share one: their answers are computed together.

    `generate`, `stream`, `streams`, `chat` and `embed` are for whoever wants a text or vectors. They stand on
    `answers_to` or `answers_to_chat`, `begin`, `step` and `abort`, from which a server makes its own loop.
    """

    def __init__(
        self,
        model: Decoder,
        tokenizer: Tokenizer,
        max_running: int = MAX_RUNNING,
        kv_bytes: int | None = None,
        chat_format: ChatFormat | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.engine = Engine(model, tokenizer.vocab_size, max_running=max_running, kv_bytes=kv_bytes)
        self.chat_format = chat_format or ChatFormat.of(None, tokenizer)
        self._prompts = Prompts(model.config, tokenizer, self.chat_format)
        self._answers: dict[Sequence, Answer] = {}
        self._paused: set[Sequence] = set()
        self._lock = threading.Lock()

    @property
    def config(self) -> DecoderConfig:
        """The model's shape."""
        return self.model.config

    @property
    def answers(self) -> list[Answer]:
        """Those that have begun and not ended, oldest first."""
        return list(self._answers.values())

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
        """The assistant's answer to a conversation of {role, content} messages, by the model's own chat template."""
        turns = parse_messages([asdict(turn) if isinstance(turn, ChatMessage) else turn for turn in messages])
        [answer] = self.answers_to_chat(turns, _params(sampling))
        self.begin(answer)
        return "".join(self._read(answer))

    def streams(self, prompt: str, num_samples: int, **sampling: Any) -> list[Iterator[str]]:
        """Several answers to one prompt, computed together whichever is read first. Sample i uses seed + i."""
        if num_samples < 1:
            raise InvalidInput(f"num_samples must be at least 1, not {num_samples}")
        answers = self.answers_to(prompt, _params(sampling), num_samples)
        for answer in answers:
            self.begin(answer)
        return [self._read(answer) for answer in answers]

    def embed(self, texts: Items[str | Items[int]]) -> NDArray[np.float32]:
        """A vector for each text (or its token ids), (N, C): the mean of the last hidden states over its tokens.

        InvalidInput for one that has no tokens, or more than the model's context.
        """
        inputs = self.encode_inputs(texts)
        return join_vectors(embed_in_slices(self.model, inputs), len(inputs), self.config.n_embd)

    def encode_inputs(self, texts: Items[str | Items[int]]) -> list[list[int]]:
        """The tokens of texts that are to become vectors; InvalidInput names the one that cannot."""
        inputs = [self._prompts.encode(text) if isinstance(text, str) else list(text) for text in texts]
        check_inputs(inputs, self.config)
        return inputs

    def answers_to(
        self,
        prompt: str | Items[int],
        params: SamplingParams,
        num_answers: int = 1,
        *,
        echo: bool = False,
        owner: str = LOCAL_OWNER,
        adapter: str | None = None,
    ) -> list[Answer]:
        """Answers to a text or to token ids, to be begun: answer i draws with seed + i.

        With `echo` they begin with the prompt; then `max_tokens` 0 only scores it. Encoding a long text takes its time.
        """
        prompt_ids = self._prompts.to_go_on_from(prompt) if isinstance(prompt, str) else list(prompt)
        text = prompt if isinstance(prompt, str) else self.tokenizer.decode(prompt_ids)
        return [
            self._answer(sequence, shown_by, echo=text if echo else None)
            for sequence, shown_by in self._sequences(prompt_ids, params, num_answers, owner, adapter, echo)
        ]

    def answers_to_chat(
        self,
        messages: Items[ChatMessage],
        params: SamplingParams,
        num_answers: int = 1,
        *,
        tools: Items[Mapping[str, Any]] = (),
        must_call: bool = False,
        owner: str = LOCAL_OWNER,
        adapter: str | None = None,
    ) -> list[Answer]:
        """The assistant's next turn in a conversation, to be begun, as often as asked.

        `tools` are definitions in OpenAI's form. InvalidInput where the model's template knows none. With `must_call`
        the grammar makes each answer a call as JSON, whatever form the template teaches.
        """
        prompt_ids = self._prompts.of_chat(messages, tools)
        params = replace(params, stop=(*params.stop, *self.chat_format.stop_strings))
        return [
            self._answer(sequence, shown_by, is_turn=True, may_call=bool(tools), must_call=must_call)
            for sequence, shown_by in self._sequences(prompt_ids, params, num_answers, owner, adapter)
        ]

    def samples_of(
        self,
        prompt_ids: Items[int],
        params: SamplingParams,
        num_samples: int,
        *,
        owner: str,
        adapter: str | None,
        wishes: PromptWishes | None = None,
    ) -> list[Answer]:
        """Answers of raw tokens, to be begun: they end where the context does, and the first one scores the prompt.

        The prompt is scored where `params.num_prompt_logprobs` or `wishes` ask for that.
        """
        ends = frozenset() if params.ignore_eos else self._prompts.text_end_ids | self._prompts.turn_end_ids
        room = max(1, self.engine.max_length - len(prompt_ids))
        num_prompt_logprobs = params.num_prompt_logprobs if wishes is None else params.num_prompt_logprobs or 0
        params = replace(
            params, stop_token_ids=params.stop_token_ids | ends, max_tokens=max(1, min(params.max_tokens, room))
        )
        answers = []
        for index in range(num_samples):
            seed = None if params.seed is None else params.seed + index
            drawn_by = replace(params, seed=seed, num_prompt_logprobs=None if index else num_prompt_logprobs)
            sequence = Sequence(list(prompt_ids), drawn_by, owner, adapter, prompt_wishes=None if index else wishes)
            answers.append(self._answer(sequence, drawn_by))
        return answers

    def keep_adapter(self, name: str, adapter: Adapter) -> None:
        """Have an adapter ready under a name that no other has had; others that nobody uses may make way."""
        with self._lock:
            in_use = {answer.sequence.adapter for answer in self._answers.values()}
            self.engine.adapters.keep(name, adapter, {used for used in in_use if used is not None})

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
        """Stop an answer and free its blocks; one that has ended stays as it is."""
        with self._lock:
            if self._answers.pop(answer.sequence, None) is None:
                return
            if answer.sequence not in self._paused:
                self.engine.abort(answer.sequence)
            self._paused.discard(answer.sequence)
            answer.finish_reason = "aborted"

    def pause(self, keeps_cache: bool = False) -> None:
        """Take everything out of the engine, after a step that failed half-way, until it is resumed.

        What had been computed before is computed anew, unless the step failed in a way that cannot have spoilt it.
        """
        with self._lock:
            if not keeps_cache:
                self._reset()
            for sequence in self._answers:
                self._pause(sequence)

    def resume(self, answer: Answer) -> None:
        """Let the next steps go on with an answer where it stood before the pause."""
        with self._lock:
            self.engine.add(answer.sequence)
            self._paused.discard(answer.sequence)

    def step_alone(self, answer: Answer) -> None:
        """While all are paused go on with one of them, until it has a token more: its prompt may take several steps.

        One that fails is to be aborted.
        """
        self.resume(answer)
        try:
            while not self.step():
                pass
        except SmeltError:
            raise  # it was refused, and nothing is broken
        except Exception:
            self._reset()
            raise
        if answer.finish_reason is None:
            with self._lock:
                self._pause(answer.sequence)

    def _pause(self, sequence: Sequence) -> None:
        self.engine.remove(sequence)
        self._paused.add(sequence)

    def _reset(self) -> None:
        self.engine.reset()
        if self.engine.device.type == "cuda":
            torch.cuda.empty_cache()  # of what the failed step had taken

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
        context = (sequence.prompt_ids + sequence.output_ids)[-max(1, self.engine.max_length // 2) :]
        self._run(answer, sequence.resumed(context, answer.num_left))

    def _read(self, answer: Answer) -> Iterator[str]:
        try:
            while True:
                with self._lock:  # another thread's step may be writing it
                    text, has_ended = answer.news().text, answer.finish_reason is not None
                if text:
                    yield text
                if has_ended:
                    return
                if not text:
                    with interrupts_deferred():
                        self.step()
        except Exception:
            self.pause()
            for other in self.answers:  # they go on, whoever it was that failed
                self.resume(other)
            raise
        finally:
            with interrupts_deferred():
                self.abort(answer)

    def _sequences(
        self,
        prompt_ids: list[int],
        params: SamplingParams,
        num_answers: int,
        owner: str,
        adapter: str | None,
        echo: bool = False,
    ) -> Iterator[tuple[Sequence, SamplingParams]]:
        """What draws each answer, and the settings by which that is shown."""
        ends = frozenset() if params.ignore_eos else self._prompts.text_end_ids | self._prompts.turn_end_ids
        num_prompt_logprobs = params.num_logprobs if echo else None
        params = replace(params, stop_token_ids=params.stop_token_ids | ends, num_prompt_logprobs=num_prompt_logprobs)
        grammar = None if params.grammar is None else self._grammars.start(params.grammar)
        # The engine draws after every prompt: where only that is scored, a token that nobody sees.
        only_scores = echo and params.max_tokens == 0
        for index in range(num_answers):
            shown_by = params if params.seed is None else replace(params, seed=params.seed + index)
            state = None if grammar is None else grammar.fork()
            drawn_by = replace(shown_by, max_tokens=1, stop_token_ids=frozenset()) if only_scores else shown_by
            yield Sequence(prompt_ids, drawn_by, owner, adapter, state), shown_by

    def _answer(
        self,
        sequence: Sequence,
        params: SamplingParams,
        *,
        echo: str | None = None,
        is_turn: bool = False,
        may_call: bool = False,
        must_call: bool = False,
    ) -> Answer:
        as_taught = self.chat_format.tool_calls() if may_call else ToolCallStream(None)
        return Answer(
            sequence,
            params,
            StreamDecoder(self.tokenizer, self.chat_format.call_marks if may_call else None),
            StopStrings(params.stop),
            ToolCallStream(JSON_CALL) if must_call else as_taught,
            OuterSpace(is_turn and not self.chat_format.has_template),
            lambda token: self.tokenizer.decode_bytes([token]),
            echo,
            len(sequence.prompt_ids),
        )

    @cached_property
    def _grammars(self) -> GrammarCompiler:
        return GrammarCompiler(self.tokenizer, self.engine.vocab_size, self._prompts.turn_end_ids)


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
