import pytest

from smelt.data.chat import parse_messages, render_messages, render_prompt, stop_strings
from smelt.errors import DataError
from smelt.types import ChatMessage

TURNS = [ChatMessage("system", "Be brief."), ChatMessage("user", "Hi"), ChatMessage("assistant", "Hello")]


def test_turns_are_paragraphs():
    assert render_messages(TURNS) == "System: Be brief.\n\nUser: Hi\n\nAssistant: Hello\n\n"


def test_a_prompt_and_its_answer_are_a_conversation():
    assert render_prompt(TURNS[:2]) + " Hello\n\n" == render_messages(TURNS)
    assert "\n\nUser:" in stop_strings()
    assert not any("Assistant" in stop for stop in stop_strings())


def test_messages_are_parsed():
    assert parse_messages([{"role": "user", "content": "Hi", "name": "x"}]) == [ChatMessage("user", "Hi")]


@pytest.mark.parametrize("value", [None, [], "hi", {"role": "user"}])
def test_what_is_no_list_of_turns_is_refused(value):
    with pytest.raises(DataError, match="must be a list of turns"):
        parse_messages(value)


@pytest.mark.parametrize("turn", [{}, {"role": "user"}, {"role": "user", "content": 1}, "hi", None])
def test_the_bad_turn_is_named(turn):
    with pytest.raises(DataError, match="turn 2 of"):
        parse_messages([{"role": "user", "content": "Hi"}, turn])
