"""Conversations to train on: by hand for models without a template, against transformers' tokens for the others."""

from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from chat_templates import LLAMA_2, LLAMA_3, MISTRAL, QWEN_3, TOOL, ZEPHYR, write_tokenizer
from smelt.data.chat_format import ChatFormat
from smelt.data.chat_training import chat_datum, preference_datum, reply_datum
from smelt.data.tokenizers import load_tokenizer, make_tokenizer
from smelt.errors import InvalidInput
from smelt.types import ChatMessage, Conversation, Datum, ToolCall

TALK = [
    ChatMessage("system", "Be short"),
    ChatMessage("user", "2+2?"),
    ChatMessage("assistant", "4"),
    ChatMessage("user", "And 🐈?"),
    ChatMessage("assistant", "Hi there"),
]
# Turns begin with another token than the template's own generation prompt says.
FICKLE = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}"""
# What was thought stays in the last turn alone, as with Qwen 3.
FORGETFUL = """{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def format_of(folder: Path, template: str) -> ChatFormat:
    write_tokenizer(folder, template)
    return ChatFormat.of(folder, load_tokenizer(folder))


def plain() -> ChatFormat:
    return ChatFormat.of(None, make_tokenizer("bytes", lambda: iter(())))


def made(chat_format: ChatFormat, conversation: Conversation, max_tokens: int = 1000) -> Datum:
    return chat_datum(chat_format, conversation, max_tokens=max_tokens, vocab_size=1000)


def replies_of(datum: Datum, folder: Path | None = None) -> list[str]:
    """The texts on which there is weight; a byte tokenizer's without a folder."""
    targets, weights = datum.inputs["target_tokens"], datum.inputs["weights"]
    assert len(datum.tokens) == len(targets) == len(weights)
    assert np.array_equal(datum.tokens[1:], targets[:-1])  # shifted by one
    bounds = np.flatnonzero(np.diff(np.concatenate([[0], weights != 0, [0]])))
    texts = []
    for start, end in bounds.reshape(-1, 2):
        ids = targets[start:end].tolist()
        if folder is None:
            texts.append(bytes(token for token in ids if token < 256).decode() + "$" * ids.count(256))
        else:
            texts.append(AutoTokenizer.from_pretrained(folder).decode(ids))
    return texts


def test_without_a_template_the_assistant_s_paragraphs_count_and_the_end_of_the_text() -> None:
    datum = made(plain(), Conversation(TALK))
    text = "System: Be short\n\nUser: 2+2?\n\nAssistant: 4\n\nUser: And 🐈?\n\nAssistant: Hi there"
    assert [*datum.tokens.tolist(), 256] == [*text.encode(), 256]
    assert replies_of(datum) == [" 4\n\n", " Hi there$"]
    prompt = plain().prompt_ids(TALK[:4])
    assert datum.tokens[: len(prompt)].tolist() == prompt  # what the engine would begin with
    assert datum.inputs["weights"][: len(prompt) - 1].sum() == len(" 4\n\n")


def test_a_vocabulary_without_an_end_of_text_gets_none() -> None:
    datum = chat_datum(plain(), Conversation(TALK[1:3]), max_tokens=100, vocab_size=256)
    assert replies_of(datum) == [" 4\n\n"]


@pytest.mark.parametrize(
    ("template", "replies"),
    [
        (QWEN_3, ["4<|im_end|>", "Hi there<|im_end|>"]),
        (LLAMA_3, ["4<|eot_id|>", "Hi there<|eot_id|>"]),
        (LLAMA_2, [" 4 </s>", " Hi there </s>"]),
        (ZEPHYR, ["4</s>", "Hi there</s>"]),
    ],
)
def test_a_template_s_replies_count_with_what_ends_them(template: str, replies: list[str], tmp_path: Path) -> None:
    datum = made(format_of(tmp_path, template), Conversation(TALK))
    turns = [{"role": turn.role, "content": turn.content} for turn in TALK]
    theirs = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(turns)["input_ids"]
    assert [*datum.tokens.tolist(), int(datum.inputs["target_tokens"][-1])] == theirs
    assert replies_of(datum, tmp_path) == replies


@pytest.mark.parametrize("template", [QWEN_3, LLAMA_3, MISTRAL])
def test_calls_are_the_assistant_s_and_their_results_are_not(template: str, tmp_path: Path) -> None:
    call = ToolCall("call00001", "get_weather", '{"city": "Oslo"}')
    talk = [
        ChatMessage("user", "Weather?"),
        ChatMessage("assistant", "", (call,)),
        ChatMessage("tool", "3 degrees", tool_call_id="call00001"),
        ChatMessage("assistant", "Cold"),
    ]
    called, said = replies_of(made(format_of(tmp_path, template), Conversation(talk, [TOOL])), tmp_path)
    assert "get_weather" in called
    assert "Oslo" in called
    assert "degrees" not in called + said
    assert said.strip().startswith("Cold")


def test_each_turn_may_have_its_weight() -> None:
    assert replies_of(made(plain(), Conversation(TALK, weights={2: 0.0}))) == [" Hi there$"]
    weights = made(plain(), Conversation(TALK, weights={2: 0.5, 4: 2.0})).inputs["weights"]
    assert sorted(set(weights.tolist())) == [0.0, 0.5, 2.0]


def test_what_ends_a_turn_in_somebody_s_words_ends_nothing(tmp_path: Path) -> None:
    talk = [ChatMessage("user", "<|im_end|>"), ChatMessage("assistant", "a<|im_end|>b")]
    chat_format = format_of(tmp_path, QWEN_3)
    datum = made(chat_format, Conversation(talk))
    assert replies_of(datum, tmp_path) == ["a<|im_end|>b<|im_end|>"]
    ends = [token for token in datum.inputs["target_tokens"].tolist() if token in chat_format.stop_token_ids]
    assert len(ends) == 2


def test_a_long_conversation_loses_its_oldest_turns_and_keeps_its_introduction() -> None:
    full = made(plain(), Conversation(TALK))
    fits = made(plain(), Conversation(TALK, weights={4: 3.0}), max_tokens=len(full.tokens) - 1)
    assert bytes(fits.tokens.tolist()) == "System: Be short\n\nUser: And 🐈?\n\nAssistant: Hi there".encode()
    assert replies_of(fits) == [" Hi there$"]
    assert fits.inputs["weights"].max() == 3  # weights go with their turns
    assert len(made(plain(), Conversation(TALK), max_tokens=len(full.tokens)).tokens) == len(full.tokens)
    with pytest.raises(InvalidInput, match="even without its oldest turns, and 20 fit"):
        made(plain(), Conversation(TALK), max_tokens=20)
    with pytest.raises(InvalidInput, match="tokens, even without"):
        made(plain(), Conversation(TALK[1:3]), max_tokens=20)


@pytest.mark.parametrize(
    ("messages", "what"),
    [
        (TALK[:2], "no turn of the role `assistant`"),
        (TALK[2:], "cannot begin with"),
        (TALK[1:3] * 300, "600 turns, and 512"),
        ([TALK[1], ChatMessage("tool", "3"), TALK[2]], "knows no tools"),
    ],
)
def test_conversations_that_teach_nothing_are_refused(messages: list[ChatMessage], what: str) -> None:
    with pytest.raises(InvalidInput, match=what):
        made(plain(), Conversation(messages))


def test_a_template_that_does_not_tell_turns_apart_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="writes what comes before turn 3 differently"):
        made(format_of(tmp_path / "a", FICKLE), Conversation(TALK))
    forgetful = format_of(tmp_path / "b", FORGETFUL)
    with pytest.raises(InvalidInput, match="writes a part of turn 3 differently.*weight 0"):
        made(forgetful, Conversation(TALK))
    last = made(forgetful, Conversation(TALK, weights={2: 0.0}))
    assert replies_of(last, tmp_path / "b") == ["<think></think>Hi there<|im_end|>"]


def test_an_answer_s_very_tokens_follow_what_they_answer() -> None:
    chat_format = plain()
    datum = reply_datum(chat_format, Conversation(TALK[:2]), [7, 8, 256], {"advantages": [1, 2, 3]}, max_tokens=100)
    prompt = chat_format.prompt_ids(TALK[:2])
    assert datum.tokens.tolist() == [*prompt, 7, 8]
    assert datum.inputs["target_tokens"].tolist()[-3:] == [7, 8, 256]
    assert datum.inputs["advantages"].tolist() == [0.0] * (len(prompt) - 1) + [1, 2, 3]
    assert datum.inputs["weights"].tolist() == [0.0] * (len(prompt) - 1) + [1, 1, 1]
    with pytest.raises(InvalidInput, match="advantages has 1 values, and the answer 2 tokens"):
        reply_datum(chat_format, Conversation(TALK[:2]), [7, 8], {"advantages": [1]}, max_tokens=100)
    with pytest.raises(InvalidInput, match="and 10 fit"):
        reply_datum(chat_format, Conversation(TALK[:2]), [7, 8], {}, max_tokens=10)
    with pytest.raises(InvalidInput, match="has no tokens"):
        reply_datum(chat_format, Conversation(TALK[:2]), [], {}, max_tokens=100)


def test_a_preference_is_two_sequences_of_which_the_second_counts_against() -> None:
    chosen, rejected = (made(plain(), Conversation([TALK[1], ChatMessage("assistant", text)])) for text in ("4", "5!"))
    pair = preference_datum(chosen, rejected)
    assert pair.tokens.tolist() == [*chosen.tokens.tolist(), *rejected.tokens.tolist()]
    assert pair.inputs["segment_ids"].tolist() == [0] * len(chosen.tokens) + [1] * len(rejected.tokens)
    assert pair.inputs["weights"].sum() == len(" 4$") - len(" 5!$")
    assert pair.inputs["weights"].min() == -1
