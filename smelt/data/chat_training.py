"""Conversations to train on: their tokens, with weight on what the assistant said; knows no loss and no model.

Which tokens are the assistant's is found by rendering the conversation up to each of its turns, and up to where that
turn would begin. What lies between is what a model has to write itself, with the token that ends its turn. That needs
a template which writes a turn the same whatever follows it.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from smelt.data.chat_format import ChatFormat, Rendering
from smelt.errors import InvalidInput
from smelt.types import ASSISTANT, ChatExample, Conversation, Datum

INTRODUCTIONS = ("system", "developer")  # roles of turns that stay when old ones are left out
MAX_TURNS = 512  # of a conversation: each of the assistant's is rendered with all that came before it


def examples_data(
    chat_format: ChatFormat, examples: Sequence[ChatExample], max_tokens: int, vocab_size: int
) -> list[Datum]:
    """What each example becomes, by one of the functions below. InvalidInput says which one cannot be."""
    data = []
    for number, example in enumerate(examples):
        try:
            data.append(_example_datum(chat_format, example, max_tokens, vocab_size))
        except InvalidInput as error:
            raise InvalidInput(f"data[{number}]: {error}", error.param or "data") from None
    return data


def _example_datum(chat_format: ChatFormat, example: ChatExample, max_tokens: int, vocab_size: int) -> Datum:
    conversation = example.conversation
    if example.reply_ids is not None:
        return reply_datum(chat_format, conversation, example.reply_ids, example.inputs, max_tokens=max_tokens)
    chosen = chat_datum(chat_format, conversation, max_tokens=max_tokens, vocab_size=vocab_size)
    if example.rejected is None:
        return chosen
    rejected = chat_datum(chat_format, example.rejected, max_tokens=max_tokens, vocab_size=vocab_size)
    return preference_datum(chosen, rejected)


def chat_datum(chat_format: ChatFormat, conversation: Conversation, *, max_tokens: int, vocab_size: int) -> Datum:
    """The conversation as one example: targets shifted, and `weights` that are 0 but on what the assistant said.

    One that is longer than `max_tokens` loses its oldest turns, as few as will do, but never its introduction.
    InvalidInput where nothing is left to train on, where not even the last reply fits with what it answers, and where
    the template does not let turns be told apart. `vocab_size` is the model's.
    """
    _check_turns(conversation)
    tokens = _fitting(chat_format, conversation, max_tokens, vocab_size)
    weights = np.zeros(len(tokens.ids), np.float32)
    for number, weight in tokens.conversation.counted.items():
        weights[tokens.reply(number)] = weight
    return _shifted(tokens.ids, {"weights": weights})


def reply_datum(
    chat_format: ChatFormat,
    conversation: Conversation,
    reply_ids: Sequence[int],
    inputs: Mapping[str, Sequence[float]],
    *,
    max_tokens: int,
) -> Datum:
    """A conversation that is to be gone on with, and behind it the very tokens of an answer.

    `inputs` have a value for each of these tokens, and become 0 on what comes before; so do the `weights` of 1.
    InvalidInput where they have more or fewer values, or the answer does not fit with what it answers.
    """
    for name, values in inputs.items():
        if len(values) != len(reply_ids):
            raise InvalidInput(
                f"{name} has {len(values)} values, and the answer {len(reply_ids)} tokens; give one for each", name
            )
    if not reply_ids:
        raise InvalidInput("an answer has no tokens", "target_tokens")
    prompt_ids = chat_format.prompt_ids(conversation.messages, conversation.tools)
    _check_length(len(prompt_ids) + len(reply_ids) - 1, max_tokens)
    before = np.zeros(len(prompt_ids), np.float32)
    given = {"weights": [1.0] * len(reply_ids), **inputs}
    whole = {name: np.concatenate([before, np.array(values, np.float32)]) for name, values in given.items()}
    return _shifted([*prompt_ids, *reply_ids], whole)


def preference_datum(chosen: Datum, rejected: Datum) -> Datum:
    """Two examples as one of a preference: the second sequence has the segment 1, and weights below 0."""
    sizes = [len(chosen.tokens), len(rejected.tokens)]
    return Datum(
        np.concatenate([chosen.tokens, rejected.tokens]),
        {
            "target_tokens": np.concatenate([chosen.inputs["target_tokens"], rejected.inputs["target_tokens"]]),
            "weights": np.concatenate([chosen.inputs["weights"], -rejected.inputs["weights"]]),
            "segment_ids": np.repeat(np.arange(2), sizes),
        },
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Tokens:
    """A conversation as text and as tokens, each of which ends somewhere in the text."""

    conversation: Conversation
    rendering: Rendering
    text: str
    ids: list[int]
    ends: list[int]
    stop_token_ids: AbstractSet[int]

    def reply(self, number: int) -> slice:
        """The tokens of a turn of the assistant's, up to that which ends it: no model is asked for what follows."""
        is_last = number == len(self.conversation.messages) - 1
        start, end = _span(self.rendering, self.text, number, is_last=is_last)
        first, last = bisect_right(self.ends, start), bisect_right(self.ends, end)
        stops = [place for place in range(first, last) if self.ids[place] in self.stop_token_ids]
        return slice(first, stops[-1] + 1 if stops else last)


def _tokens(chat_format: ChatFormat, conversation: Conversation, vocab_size: int) -> _Tokens:
    messages = conversation.messages
    rendering = chat_format.rendering(messages, conversation.tools)
    text = rendering.text_of(len(messages), False)
    last_ids = [token for token in rendering.last_ids if token < vocab_size and messages[-1].role == ASSISTANT]
    if last_ids:  # they say that the reply is over, as a paragraph's end would
        text = text.rstrip("\n")
    ids, ends = rendering.encode(text)
    return _Tokens(
        conversation,
        rendering,
        text,
        ids + last_ids,
        ends + [len(text)] * len(last_ids),
        chat_format.stop_token_ids,
    )


def _fitting(chat_format: ChatFormat, conversation: Conversation, max_tokens: int, vocab_size: int) -> _Tokens:
    """The conversation, or what is left of it when as few old turns as will do are left out."""

    def num_tokens(option: Conversation) -> int:
        return len(_tokens(chat_format, option, vocab_size).ids) - 1

    whole = _tokens(chat_format, conversation, vocab_size)
    if len(whole.ids) - 1 <= max_tokens:
        return whole
    shorter = _shorter(conversation)
    chosen = bisect_left(shorter, True, key=lambda option: num_tokens(option) <= max_tokens)
    if chosen == len(shorter):
        _check_length(num_tokens(([conversation, *shorter])[-1]), max_tokens)
    return _tokens(chat_format, shorter[chosen], vocab_size)


def _shorter(conversation: Conversation) -> list[Conversation]:
    """What is left without the oldest turns: without few of them first. All begin with somebody's question."""
    roles = [turn.role for turn in conversation.messages]
    first = next(number for number, role in enumerate(roles) if role not in INTRODUCTIONS)
    starts = [
        number for number in range(first + 1, len(roles)) if roles[number] == "user" and roles[number - 1] == ASSISTANT
    ]
    left = [conversation.without(first, start) for start in starts]
    return [option for option in left if option.counted]


def _check_turns(conversation: Conversation) -> None:
    messages = conversation.messages
    if len(messages) > MAX_TURNS:
        raise InvalidInput(f"a conversation has {len(messages)} turns, and {MAX_TURNS} are allowed", "messages")
    if not conversation.counted:
        raise InvalidInput("there is no turn of the role `assistant` to train on", "messages")
    if messages[0].role == ASSISTANT:
        raise InvalidInput("a conversation cannot begin with a turn of the role `assistant`", "messages")


def _span(rendering: Rendering, text: str, number: int, *, is_last: bool) -> tuple[int, int]:
    """Where in the text a turn of the assistant's begins and ends. InvalidInput where that cannot be told."""
    before = rendering.text_of(number, True)
    with_it = text if is_last else rendering.text_of(number + 1, False)
    if not text.startswith(before):
        raise _not_told_apart(number, "what comes before")
    if not text.startswith(with_it) and not with_it.startswith(text):
        raise _not_told_apart(number, "a part of")
    return len(before), min(len(with_it), len(text))


def _not_told_apart(number: int, what: str) -> InvalidInput:
    return InvalidInput(
        f"the model's chat template writes {what} turn {number + 1} differently depending on what follows, so that it "
        f"cannot be trained on here: let each conversation end with the assistant's turn that counts, and give earlier "
        f"ones the weight 0",
        "messages",
    )


def _check_length(num_tokens: int, max_tokens: int) -> None:
    if num_tokens > max_tokens:
        raise InvalidInput(
            f"a conversation has {num_tokens} tokens, even without its oldest turns, and {max_tokens} fit; shorten it",
            "messages",
        )


def _shifted(token_ids: Sequence[int], inputs: Mapping[str, NDArray[np.float32]]) -> Datum:
    """Each token predicts the next; of the inputs those are taken that belong to targets."""
    ids = np.array(token_ids, np.int64)
    return Datum(ids[:-1].astype(np.int32), {"target_tokens": ids[1:], **{n: v[1:] for n, v in inputs.items()}})
