"""The operator's rules: read with the line of what is wrong, matched, in answers as they are written."""

import time
from pathlib import Path

import pytest

from smelt.control.ban_rules import MAX_SPAN, OutputWatch, Rules, read_rules
from smelt.errors import ConfigError

RULES = r"""
- {name: said, match: exact, text: "Open Sesame"}
- name: spam
  match: substring
  text: Buy now
  on: prompt
- {name: card, match: regex, text: '\b(?:\d[ -]?){13,16}\b', on: output}
- {name: loud, match: substring, text: ACHTUNG, case: true}
- {name: street, match: regex, text: '^straße$'}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "rules.yaml"
    path.write_text(RULES)
    return path


@pytest.fixture
def rules(file: Path) -> Rules:
    return read_rules(file)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("  open sesame\n", "said"),
        ("open sesame!", None),
        ("Please BUY NOW, please", "spam"),
        ("ACHTUNG!", "loud"),
        ("achtung!", None),
        ("STRAßE", "street"),
        ("die Straße", None),
        ("4111 1111 1111 1111", None),
        ("", None),
    ],
)
def test_prompts_are_matched(rules: Rules, text: str, name: str | None) -> None:
    assert rules.prompts.forbidding(text) == name


@pytest.mark.parametrize(
    ("text", "name"),
    [("It is 4111-1111-1111-1111.", "card"), ("buy now", None), ("Open sesame", "said"), ("ACHTUNG", "loud")],
)
def test_answers_are_matched_whole_and_as_they_are_written(rules: Rules, text: str, name: str | None) -> None:
    assert rules.outputs.forbidding(text) == name
    watch = OutputWatch(rules)
    found = [broken for letter in text if (broken := watch.push(letter)) is not None] or [watch.finish()]
    assert found[0] == name


def test_long_answers_are_watched_to_the_end_without_being_kept(rules: Rules) -> None:
    watch = OutputWatch(rules)
    for _ in range(100):
        assert watch.push("x" * 1000) is None
    assert len(watch._text) <= MAX_SPAN
    assert watch.push("AC") is None
    assert watch.push("HTUNG") == "loud"
    assert watch.finish() is None


def test_no_rule_and_no_prompt_can_stop_the_server(tmp_path: Path) -> None:
    path = tmp_path / "rules.yaml"
    path.write_text("- {name: slow, match: regex, text: '(a+)+$'}\n- {name: x, match: regex, text: '(.*a){12}$'}\n")
    rules = read_rules(path)
    started_at = time.perf_counter()
    assert rules.prompts.forbidding("a" * 100_000 + "b") is None
    assert time.perf_counter() - started_at < 5  # Python's own engine would need longer than the universe has


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("- name: a\n  match: [", "line 2: not valid YAML"),
        ("name: a", "line 1: write a list of rules"),
        ("\n- {name: a, match: exact, text: x}\n- {name: b, match: like, text: x}", "line 3: match: .*'like'"),
        ("- {name: a, match: exact}", "line 1: text is missing: what is looked for"),
        ("- {name: a, match: exact, text: ''}", "line 1: text: "),
        ("- {name: a, match: exact, text: 7}", "line 1: text: "),
        ("- {name: a, match: exact, text: x, where: output}", "line 1: unknown key 'where'; known keys: case, match"),
        ("- {name: a, match: exact, text: x, on: input}", "line 1: on: "),
        ("- {name: a, match: regex, text: '(x'}", r"line 1: text: RE2 does not know this expression \(missing \)"),
        ("- {name: a, match: regex, text: '(?=x)'}", "line 1: text: RE2 does not know .*invalid perl operator"),
        ("- just words", "line 1: "),
        ("- !!python/object/apply:os.system [ls]", "line 1: "),
    ],
)
def test_what_is_wrong_is_told_with_its_line(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "rules.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=f"rules.yaml, {reason}"):
        read_rules(path)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml cannot be read"):
        read_rules(tmp_path / "none.yaml")


def test_an_empty_file_forbids_nothing(tmp_path: Path) -> None:
    (tmp_path / "rules.yaml").write_text("# none yet\n")
    rules = read_rules(tmp_path / "rules.yaml")
    assert not rules.prompts
    assert not rules.outputs
    assert rules.prompts.forbidding("") is None
