"""Lines of every form become examples; what is wrong is said of all bad lines at once, with their numbers."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from smelt.data.characters import ByteTokenizer
from smelt.data.chat_format import ChatFormat
from smelt.data.training_examples import (
    Located,
    Preference,
    TextExample,
    check_examples,
    parse_example,
    read_examples,
    samples_of,
    text_data,
)
from smelt.errors import DataError, InvalidInput
from smelt.types import ChatMessage, Conversation

HELLO = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
TOKENIZER = ByteTokenizer()


def write(path: Path, *lines: Any) -> Path:
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def test_every_form_is_understood(tmp_path: Path) -> None:
    lines = [
        {"messages": HELLO},
        {"prompt": "2+2=", "completion": "4"},
        {"text": "Once upon a time"},
        {"input": {"messages": HELLO[:1]}, "preferred_output": HELLO[1:], "non_preferred_output": HELLO[1:]},
    ]
    for name in ("train.jsonl", "train.jsonl.gz"):
        kinds = [type(each.example) for each in read_examples(write(tmp_path / name, *lines))]
        assert kinds == [Conversation, TextExample, TextExample, Preference]


def test_a_turns_weight_and_the_tools_are_kept() -> None:
    tools = [{"type": "function", "function": {"name": "look"}}]
    turns = [*HELLO, {"role": "user", "content": "Bye"}, {"role": "assistant", "content": "Bye", "weight": 0}]
    example = parse_example({"messages": turns, "tools": tools})
    assert isinstance(example, Conversation)
    assert (example.counted, example.tools) == ({1: 1.0}, tools)


def test_a_text_may_come_in_parts() -> None:
    parts = [{"type": "text", "text": "He"}, {"type": "text", "text": "llo"}]
    example = parse_example({"messages": [HELLO[0], {"role": "assistant", "content": parts}]})
    assert isinstance(example, Conversation)
    assert example.messages[1] == ChatMessage("assistant", "Hello")


def test_of_a_preference_only_the_last_turns_count() -> None:
    asked = [*HELLO, {"role": "user", "content": "And?"}]
    better, worse = [{"role": "assistant", "content": "Yes"}], [{"role": "assistant", "content": "No"}]
    example = parse_example({"input": {"messages": asked}, "preferred_output": better, "non_preferred_output": worse})
    assert isinstance(example, Preference)
    assert example.chosen.counted == example.rejected.counted == {3: 1.0}
    assert (example.chosen.messages[3].content, example.rejected.messages[3].content) == ("Yes", "No")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ([1], "is not an object with `messages`"),
        ({"question": "?"}, r"has none of `messages`.*only 'question'"),
        ({"messages": []}, "`messages` must be a list of turns"),
        ({"messages": [{"role": "user"}]}, "turn 1 of `messages` must have a `role` and a `content`"),
        ({"messages": HELLO[:1]}, "no turn of the role `assistant` counts"),
        ({"messages": [HELLO[0], {**HELLO[1], "weight": 0.5}]}, r"a `weight` is 0\.5; it is 0"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, HELLO[1]]}, "of the type 'image_url'"),
        ({"messages": HELLO, "tools": "all"}, "`tools` must be a list"),
        ({"prompt": "2+2="}, "`completion` must be a text"),
        ({"prompt": 4, "completion": "4"}, "`prompt` must be a text"),
        ({"text": ""}, "`text` must be a text that is not empty"),
        ({"preferred_output": HELLO[1:]}, "`input` must be a list of turns"),
        (
            {"input": {"messages": HELLO[:1]}, "preferred_output": HELLO[:1], "non_preferred_output": HELLO[1:]},
            "must end with a turn of the role `assistant`",
        ),
    ],
)
def test_what_is_wrong_with_a_line_is_said(record: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        parse_example(record)


def test_bad_lines_are_named_together(tmp_path: Path) -> None:
    path = write(tmp_path / "train.jsonl", {"text": "good"}, "{nonsense", {"text": ""}, *[[]] * 30)
    with pytest.raises(DataError) as error:
        read_examples(path, "train.jsonl")
    told = str(error.value).splitlines()
    assert told[0].startswith("train.jsonl, line 2 is not JSON")
    assert told[1].startswith("train.jsonl, line 3: `text` must be")
    assert (len(told), told[-1]) == (21, "and 12 more")


def test_files_that_are_no_json_lines_or_empty_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not JSON lines"):
        read_examples(write(tmp_path / "train.csv", "text"))
    with pytest.raises(DataError, match="holds no examples"):
        read_examples(write(tmp_path / "train.jsonl", ""))


def learned(example: TextExample, max_tokens: int) -> list[bytes]:
    """What each datum teaches."""
    data = text_data(example, TOKENIZER, max_tokens)
    assert all(len(datum.tokens) <= max_tokens for datum in data)
    ids = [datum.inputs["target_tokens"][datum.inputs["weights"] > 0] for datum in data]
    return [b"".join(b"|" if token == TOKENIZER.eot_id else bytes([token]) for token in each) for each in ids]


def test_of_a_completion_all_is_learned_and_of_its_prompt_nothing() -> None:
    (datum,) = text_data(TextExample("2+2=", "4"), TOKENIZER, 16)
    assert bytes(datum.tokens.tolist()) == b"2+2=4"
    assert datum.inputs["weights"].tolist() == [0, 0, 0, 1, 1]
    assert learned(TextExample("2+2=", "4"), 16) == [b"4|"]


def test_a_long_text_becomes_several_and_every_token_of_it_is_learned_once() -> None:
    assert learned(TextExample("", "abcdefgh"), 3) == [b"bcd", b"efg", b"h|"]


def test_a_long_prompt_loses_its_beginning_and_a_long_completion_is_refused() -> None:
    (datum,) = text_data(TextExample("abcdef", "gh"), TOKENIZER, 4)
    assert bytes(datum.tokens.tolist()) == b"efgh"
    with pytest.raises(InvalidInput, match="the completion has 7 tokens"):
        text_data(TextExample("a", "bcdefg"), TOKENIZER, 4)


def test_samples_say_where_they_come_from_and_faults_are_named_together() -> None:
    chat_format = ChatFormat(Path(), TOKENIZER, None)
    turns = [ChatMessage("user", "Hi"), ChatMessage("assistant", "Hello")]
    good = Located("line 1", Conversation(turns))
    (sample,) = samples_of([good], chat_format, TOKENIZER, 64, 257)
    (datum,) = sample.data
    counted = datum.inputs["target_tokens"][datum.inputs["weights"] > 0]
    assert (sample.where, sample.num_targets) == ("line 1", np.count_nonzero(datum.inputs["weights"]))
    assert bytes(token for token in counted if token < 256).strip() == b"Hello"
    bad = [Located(f"line {number}", TextExample("a", "b" * 100)) for number in (2, 3)]
    with pytest.raises(DataError, match=r"line 2: the completion .*\nline 3: the completion"):
        samples_of([good, *bad], chat_format, TOKENIZER, 64, 257)


def test_a_file_is_checked_for_a_method_without_keeping_it(tmp_path: Path) -> None:
    path = tmp_path / "mixed.jsonl"
    texts = ['{"text": "a b"}', '{"prompt": 1}', '{"text": "c d"}']
    path.write_text("\n".join(texts), encoding="utf-8")
    with pytest.raises(DataError, match="(?s)data, line 2: .*`prompt` must be a text"):
        check_examples(path, "data", "supervised")
    path.write_text("\n".join(texts[::2]), encoding="utf-8")
    assert check_examples(path, "data", "supervised") == 2
    with pytest.raises(DataError, match="(?s)data, line 1 is no preference.*method supervised.*data, line 2 is no"):
        check_examples(path, "data", "dpo")
    path.write_text("", encoding="utf-8")
    with pytest.raises(DataError, match="data holds no examples"):
        check_examples(path, "data", "dpo")
