"""Examples to fine-tune on, out of JSON lines: conversations, prompts with completions, texts, preferences.

A line is an object of one of these forms; the first and the last are OpenAI's:

    {"messages": [{"role": "user", "content": "."}, {"role": "assistant", "content": ".", "weight": 1}], "tools": []}
    {"prompt": "...", "completion": "..."}
    {"text": "..."}
    {"input": {"messages": [...], "tools": []}, "preferred_output": [...], "non_preferred_output": [...]}

What is wrong with a file is said of all its lines at once, up to MAX_FAULTS of them. Knows no model and no loss.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from smelt.data.chat import parse_messages
from smelt.data.chat_format import ChatFormat
from smelt.data.chat_training import chat_datum
from smelt.data.documents import Documents, Reading
from smelt.data.readers import input_file, jsonl_records, read_file
from smelt.data.tokenizers import Tokenizer
from smelt.errors import DataError, InvalidInput, TokenizerError
from smelt.types import ASSISTANT, ChatMessage, Conversation, Datum

MAX_FAULTS = 20
FORMS = "`messages`, `prompt` and `completion`, `text`, or `input`, `preferred_output` and `non_preferred_output`"
FORMATS = (".jsonl", ".json")


@dataclass(frozen=True, slots=True)
class TextExample:
    """What to go on from, and what to write then; without a prompt a text to learn whole."""

    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class Preference:
    """Two conversations that differ in their last turns, which alone are of interest."""

    chosen: Conversation
    rejected: Conversation


Example = TextExample | Conversation | Preference


@dataclass(frozen=True, slots=True)
class Located:
    """An example, and where it stands, for messages."""

    where: str
    example: Example


@dataclass(frozen=True, slots=True)
class Sample:
    """An example as tokens: one sequence, or the better and the worse one of a preference."""

    where: str
    data: tuple[Datum, ...]

    @property
    def num_tokens(self) -> int:
        """That go through a model."""
        return sum(len(datum.tokens) for datum in self.data)

    @property
    def num_targets(self) -> int:
        """Tokens that count."""
        return sum(int(np.count_nonzero(datum.inputs["weights"])) for datum in self.data)


@dataclass(slots=True)
class Faults(Reading):
    """What is wrong with the lines of a file, gathered to be said together."""

    reasons: list[str] = field(default_factory=list)

    def reject(self, reason: str) -> None:
        """Note a bad line."""
        self.num_skipped += 1
        if len(self.reasons) < MAX_FAULTS:
            self.reasons.append(reason)

    def check(self) -> None:
        """DataError with a line for each of the first ones."""
        if self.reasons:
            more = self.num_skipped - len(self.reasons)
            raise DataError("\n".join([*self.reasons, *([f"and {more:,} more"] if more else [])]))


def read_examples(path: Path, label: str | None = None) -> list[Located]:
    """The examples of a file. DataError names the first bad lines, or says that there is none."""
    faults = Faults()
    examples = list(_examples(path, label, faults))
    faults.check()
    if not examples:
        raise _no_examples(label or str(path))
    return examples


def check_examples(path: Path, label: str, method: str) -> int:
    """How many examples a file has, all of them for that method; none of them is kept. DataError."""
    faults, num_examples = Faults(), 0
    for located in _examples(path, label, faults):
        if (fault := wrong_kind(located.example, method)) is not None:
            faults.reject(f"{located.where} {fault}")
        num_examples += 1
    faults.check()
    if not num_examples:
        raise _no_examples(label)
    return num_examples


def wrong_kind(example: Example, method: str) -> str | None:
    """What is said of an example that the method cannot learn from."""
    if isinstance(example, Preference) == (method == "dpo"):
        return None
    has, other = ("a preference", "dpo") if isinstance(example, Preference) else ("no preference", "supervised")
    return f"is {has}, and the method is {method}; choose the method {other}"


def _examples(path: Path, label: str | None, faults: Faults) -> Iterator[Located]:
    file = input_file(path, label)
    if file.kind not in FORMATS:
        raise DataError(f"{file.label} is not JSON lines; examples are read from .jsonl files, also .jsonl.gz and .zst")
    for where, record in jsonl_records(file, faults):
        try:
            yield Located(where, parse_example(record))
        except DataError as error:
            faults.reject(f"{where}: {error}")


def _no_examples(label: str) -> DataError:
    return DataError(f"{label} holds no examples; each line is an object with {FORMS}")


def read_texts(path: Path, label: str | None = None) -> list[Located]:
    """The documents of a file of any format that datasets are made of, as texts to learn whole. DataError."""
    file = input_file(path, label)
    located = located_texts(read_file(file, Reading()), file.label)
    if not located:
        raise DataError(f"{file.label} holds no text")
    return located


def located_texts(documents: Documents, label: str) -> list[Located]:
    """Documents, put together from their pieces, as texts to learn whole."""
    found: list[Located] = []
    parts: list[str] = []
    for piece in documents:
        parts.append(piece.text)
        if piece.is_last:
            found.append(Located(f"{label}, document {len(found) + 1:,}", TextExample("", "".join(parts))))
            parts.clear()
    return found


def parse_example(record: Any) -> Example:
    """The example in a line's value. DataError says what it lacks."""
    if not isinstance(record, dict):
        raise DataError(f"is not an object with {FORMS}, but a {type(record).__name__}")
    if "messages" in record:
        return _conversation(record["messages"], record)
    if "preferred_output" in record or "non_preferred_output" in record:
        return _preference(record)
    if "completion" in record or "prompt" in record:
        return TextExample(_text(record, "prompt"), _text(record, "completion"))
    if "text" in record:
        return TextExample("", _text(record, "text"))
    raise DataError(f"has none of {FORMS}, only {', '.join(map(repr, record))[:200] or 'nothing'}")


def _text(record: dict[str, Any], name: str) -> str:
    value = record.get(name)
    if not isinstance(value, str) or (not value and name != "prompt"):
        raise DataError(f"`{name}` must be a text that is not empty" if name != "prompt" else "`prompt` must be a text")
    return value


def _conversation(messages: Any, record: dict[str, Any]) -> Conversation:
    turns, weights = _turns(messages)
    conversation = Conversation(turns, _tools(record), weights)
    if not conversation.counted:
        raise DataError("no turn of the role `assistant` counts, so there is nothing to learn")
    return conversation


def _preference(record: dict[str, Any]) -> Preference:
    given = record.get("input")
    given = given if isinstance(given, dict) else {}
    asked, _ = _turns(given.get("messages"), "input")
    answers = [_turns(record.get(name), name)[0] for name in ("preferred_output", "non_preferred_output")]
    if any(answer[-1].role != ASSISTANT for answer in answers):
        raise DataError("`preferred_output` and `non_preferred_output` must end with a turn of the role `assistant`")
    tools, silent = _tools(given), {number: 0.0 for number, turn in enumerate(asked) if turn.role == ASSISTANT}
    chosen, rejected = (Conversation([*asked, *answer], tools, silent) for answer in answers)
    return Preference(chosen, rejected)


def _turns(value: Any, name: str = "messages") -> tuple[list[ChatMessage], dict[int, float]]:
    """Turns, and how much those of the assistant's count that say so."""
    turns = [_with_plain_content(turn) for turn in value] if isinstance(value, list) else value
    try:
        messages = parse_messages(turns)
    except DataError as error:
        raise DataError(str(error).replace("`messages`", f"`{name}`")) from None
    weights = {
        number: turn["weight"] for number, turn in enumerate(turns) if turn["role"] == ASSISTANT and "weight" in turn
    }
    if bad := [weight for weight in weights.values() if weight not in (0, 1)]:
        raise DataError(f"a `weight` is {bad[0]!r:.40}; it is 0, for a turn that does not count, or 1")
    return messages, {number: float(weight) for number, weight in weights.items()}


def _with_plain_content(turn: Any) -> Any:
    """OpenAI's form allows a text in parts."""
    if not isinstance(turn, dict) or not isinstance(turn.get("content"), list):
        return turn
    parts = [part if isinstance(part, dict) else {} for part in turn["content"]]
    if bad := [part for part in parts if part.get("type") != "text" or not isinstance(part.get("text"), str)]:
        raise DataError(f"a part of a `content` is of the type {bad[0].get('type')!r:.40}; only text can be learned")
    return {**turn, "content": "".join(part["text"] for part in parts)}


def _tools(record: dict[str, Any]) -> Sequence[dict[str, Any]]:
    tools = record.get("tools") or ()
    if not isinstance(tools, list | tuple) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError("`tools` must be a list of definitions of functions")
    return tools


def samples_of(
    examples: Iterable[Located], chat_format: ChatFormat, tokenizer: Tokenizer, max_tokens: int, vocab_size: int
) -> list[Sample]:
    """The examples as tokens. A text that is too long becomes several.

    DataError names those that cannot be: the template refuses them, or not even the last answer fits.
    """
    faults = Faults()
    samples: list[Sample] = []
    for located in examples:
        try:
            found = _data_of(located.example, chat_format, tokenizer, max_tokens, vocab_size)
        except (InvalidInput, TokenizerError) as error:
            faults.reject(f"{located.where}: {error}")
        else:
            samples += [Sample(located.where, data) for data in found]
    faults.check()
    return samples


def _data_of(
    example: Example, chat_format: ChatFormat, tokenizer: Tokenizer, max_tokens: int, vocab_size: int
) -> list[tuple[Datum, ...]]:
    if isinstance(example, TextExample):
        return [(datum,) for datum in text_data(example, tokenizer, max_tokens)]
    sides = (example,) if isinstance(example, Conversation) else (example.chosen, example.rejected)
    return [tuple(chat_datum(chat_format, side, max_tokens=max_tokens, vocab_size=vocab_size) for side in sides)]


def text_data(example: TextExample, tokenizer: Tokenizer, max_tokens: int) -> list[Datum]:
    """A text with its end, as one example or, where it is longer than that, several.

    Of a prompt that does not fit with its completion the beginning is left out, as when text is generated. InvalidInput
    where the completion alone is too long.
    """
    first = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    end = [] if tokenizer.eot_id is None else [tokenizer.eot_id]
    completion = [*tokenizer.encode(example.completion), *end]
    if not example.prompt:
        whole = [*first, *completion]
        step = max_tokens + 1
        if len(whole) < 2:
            raise InvalidInput("the text has a single token, so there is nothing to predict")
        parts = [whole[start : start + step] for start in range(0, len(whole) - 1, max_tokens)]
        return [_shifted(part, 0) for part in parts]
    room = max_tokens + 1 - len(first) - len(completion)
    if room < 1:
        raise InvalidInput(f"the completion has {len(completion)} tokens, and with a prompt {max_tokens} fit")
    prompt = [*first, *tokenizer.encode(example.prompt)[-room:]]
    return [_shifted([*prompt, *completion], len(prompt))]


def _shifted(ids: Sequence[int], num_given: int) -> Datum:
    """Each token predicts the next; those that were given count for nothing."""
    whole = np.array(ids, np.int64)
    weights = (np.arange(1, len(whole)) >= num_given).astype(np.float32)
    return Datum(whole[:-1].astype(np.int32), {"target_tokens": whole[1:], "weights": weights})
