"""Rules of the operator's for prompts and answers: read from a YAML file, matched; knows no keys and no database.

    - {name: card, match: regex, text: '(?:\\d[ -]?){13,16}', on: output}
    - {name: spam, match: substring, text: buy now}

Regular expressions are RE2's, whose time grows with the text and with nothing else: with Python's own, a rule that
looks harmless lets one prompt stop the server.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import re2
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from smelt.configs import explained
from smelt.errors import ConfigError

MAX_SPAN = 8192  # characters of an answer that one match may stretch over
NUM_KEPT = 2 * MAX_SPAN

BOOL = "tag:yaml.org,2002:bool"

Matcher = Callable[[str], bool]


class RuleLoader(yaml.SafeLoader):
    """YAML in which `on` is a word; to YAML 1.1 it is a truth, as are off, yes and no."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != BOOL]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


RuleLoader.add_implicit_resolver(BOOL, re.compile("(?i:true|false)$"), list("tTfF"))


class RuleEntry(BaseModel):
    """A rule as the file has it."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: str = Field(min_length=1, max_length=100, description="what strikes and refusals call it")
    match: Literal["exact", "substring", "regex"] = Field(description="how a text is compared")
    text: str = Field(min_length=1, max_length=MAX_SPAN, description="what is looked for")
    on: Literal["prompt", "output", "both"] = Field("both", description="where")
    case: bool = Field(False, description="whether small letters differ from capital ones")


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule ready to be used. One that `is_exact` can tell of an answer only when it is whole."""

    name: str
    on: str
    is_exact: bool
    matches: Matcher


@dataclass(frozen=True, slots=True)
class Rules:
    """All rules, by what they look at."""

    on_prompts: tuple[Rule, ...] = ()
    on_outputs: tuple[Rule, ...] = ()

    def forbidding_prompt(self, texts: Iterable[str]) -> Rule | None:
        """The first rule that forbids one of a prompt's texts."""
        return next((rule for text in texts for rule in self.on_prompts if rule.matches(text)), None)

    def forbidding_output(self, text: str) -> Rule | None:
        """The first rule that forbids a whole answer."""
        return next((rule for rule in self.on_outputs if rule.matches(text)), None)


class OutputWatch:
    """Looks for forbidden text in an answer that is being written; what came before the match is out already."""

    def __init__(self, rules: Rules) -> None:
        self._rules = rules.on_outputs
        self._text = ""
        self._is_whole = True  # nothing of it was forgotten

    def push(self, text: str) -> Rule | None:
        """The rule that the answer breaks with this, which must then not be shown."""
        self._text += text
        if len(self._text) > NUM_KEPT + len(text):
            self._text, self._is_whole = self._text[-NUM_KEPT:], False
        return next((rule for rule in self._rules if not rule.is_exact and rule.matches(self._text)), None)

    def finish(self) -> Rule | None:
        """The rule that the answer breaks as a whole."""
        return next(
            (rule for rule in self._rules if self._is_whole and rule.is_exact and rule.matches(self._text)), None
        )


def read_rules(path: Path) -> Rules:
    """The rules in a file. ConfigError names the line of what is wrong."""
    try:
        loader = RuleLoader(path.read_text(encoding="utf-8"))
        node = loader.get_single_node()
        entries = [] if node is None else _entries(path, node)
        found = [_rule(path, entry.start_mark.line + 1, loader.construct_document(entry)) for entry in entries]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the rules in {path} cannot be read: {error}") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{path}, line {line}: not valid YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    return Rules(
        tuple(rule for rule in found if rule.on in ("prompt", "both")),
        tuple(rule for rule in found if rule.on in ("output", "both")),
    )


def _entries(path: Path, node: yaml.Node) -> list[yaml.Node]:
    if not isinstance(node, yaml.SequenceNode):
        line = node.start_mark.line + 1
        raise ConfigError(f"{path}, line {line}: write a list of rules, each {{name, match, text}}")
    return list(node.value)


def _rule(path: Path, line: int, value: object) -> Rule:
    try:
        entry = RuleEntry.model_validate(value)
        return Rule(entry.name, entry.on, entry.match == "exact", MATCHERS[entry.match](entry.text, entry.case))
    except ValidationError as report:
        raise ConfigError(f"{path}, line {line}: {explained(report, RuleEntry)}") from None
    except re2.error as error:
        reason = error.args[0].decode(errors="replace") if isinstance(error.args[0], bytes) else error
        raise ConfigError(f"{path}, line {line}: text: RE2 does not know this expression ({reason})") from None


def _exact(wanted: str, case: bool) -> Matcher:
    folded = _folded(wanted.strip(), case)
    return lambda text: _folded(text.strip(), case) == folded


def _substring(wanted: str, case: bool) -> Matcher:
    folded = _folded(wanted, case)
    return lambda text: folded in _folded(text, case)


def _regex(expression: str, case: bool) -> Matcher:
    options = re2.Options()
    options.log_errors = False
    options.case_sensitive = case
    compiled = re2.compile(expression, options)
    return lambda text: compiled.search(text) is not None


def _folded(text: str, case: bool) -> str:
    return text if case else text.casefold()


MATCHERS: dict[str, Callable[[str, bool], Matcher]] = {"exact": _exact, "substring": _substring, "regex": _regex}
