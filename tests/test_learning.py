"""The lessons point at code that exists, and answer the questions that they promise."""

import importlib
import re
from pathlib import Path

import pytest

LESSON = (Path(__file__).resolve().parents[1] / "docs/learn-ddp.md").read_text()
NAMED = sorted(set(re.findall(r"`((?:training|cluster|data|models)\.\w+\.[\w.]+)`", LESSON)))


@pytest.mark.parametrize("name", NAMED)
def test_what_a_lesson_points_at_is_there(name: str) -> None:
    package, module, *path = name.split(".")
    found = importlib.import_module(f"smelt.{package}.{module}")
    for part in path:
        found = getattr(found, part)
    assert getattr(found, "__doc__", None), "and says what it does"


def test_the_lesson_is_about_our_code_and_has_its_questions() -> None:
    assert len(NAMED) >= 15
    questions = LESSON.partition("## Five questions")[2]
    assert len(re.findall(r"^\*\*[^*]+\?\*\*", questions, re.MULTILINE)) == 5
