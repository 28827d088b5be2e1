"""Rules of the operator's for prompts and answers: read from a YAML file, matched; knows no keys and no database.

    - {name: card, match: regex, text: '(?:\\d[ -]?){13,16}', on: output}
    - {name: spam, match: substring, text: buy now}

Regular expressions are RE2's, whose time grows with the text and with nothing else: with Python's own, a rule that
looks harmless lets one prompt stop the server.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import re2
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from smelt.configs import explained
from smelt.errors import ConfigError

MAX_SPAN = 2048  # characters of an answer that one match may stretch over
MAX_MEMORY = 2**26  # bytes that RE2 may take for all rules; what it forgets then it works out again

BOOL = "tag:yaml.org,2002:bool"


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


class Patterns:
    """Rules that look at the same texts, as one automaton: to search for all of them costs as much as for one."""

    def __init__(self, entries: Iterable[RuleEntry]) -> None:
        self._names: list[str] = []
        self._exact: dict[str, str] = {}  # text -> name of its rule
        self._exact_folded: dict[str, str] = {}
        self._set = re2.Set.SearchSet(_options())
        for entry in entries:
            self._add(entry)
        self._set.Compile()

    def __bool__(self) -> bool:
        return bool(self._names or self._exact or self._exact_folded)

    def found_in(self, text: str) -> str | None:
        """The first rule whose text or expression occurs there; by name."""
        numbers = self._set.Match(text) if self._names else None
        return self._names[min(numbers)] if numbers else None

    def equal_to(self, text: str) -> str | None:
        """The rule that forbids exactly this."""
        text = text.strip()
        return self._exact.get(text) or self._exact_folded.get(text.casefold())

    def forbidding(self, text: str) -> str | None:
        """The rule that forbids a whole text."""
        return self.found_in(text) or self.equal_to(text)

    def _add(self, entry: RuleEntry) -> None:
        if entry.match == "exact":
            text = entry.text.strip()
            exact, key = (self._exact, text) if entry.case else (self._exact_folded, text.casefold())
            exact.setdefault(key, entry.name)
            return
        self._set.Add(_expression(entry))
        self._names.append(entry.name)


@dataclass(frozen=True, slots=True)
class Rules:
    """All rules, by what they look at."""

    prompts: Patterns = field(default_factory=lambda: Patterns(()))
    outputs: Patterns = field(default_factory=lambda: Patterns(()))


class OutputWatch:
    """Looks for forbidden text in an answer that is being written; what came before the match is out already."""

    def __init__(self, rules: Rules) -> None:
        self._patterns = rules.outputs
        self._text = ""
        self._is_whole = True  # nothing of it was forgotten

    def push(self, text: str) -> str | None:
        """The rule that the answer breaks with this, which must then not be shown; by name."""
        self._text += text
        found = self._patterns.found_in(self._text)
        if len(self._text) > MAX_SPAN:
            self._text, self._is_whole = self._text[-MAX_SPAN:], False
        return found

    def finish(self) -> str | None:
        """The rule that the answer breaks as a whole."""
        return self._patterns.equal_to(self._text) if self._is_whole else None


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
        Patterns(rule for rule in found if rule.on in ("prompt", "both")),
        Patterns(rule for rule in found if rule.on in ("output", "both")),
    )


def _entries(path: Path, node: yaml.Node) -> list[yaml.Node]:
    if not isinstance(node, yaml.SequenceNode):
        line = node.start_mark.line + 1
        raise ConfigError(f"{path}, line {line}: write a list of rules, each {{name, match, text}}")
    return list(node.value)


def _rule(path: Path, line: int, value: object) -> RuleEntry:
    try:
        entry = RuleEntry.model_validate(value)
        re2.compile(_expression(entry), _options())
    except ValidationError as report:
        raise ConfigError(f"{path}, line {line}: {explained(report, RuleEntry)}") from None
    except re2.error as error:
        reason = error.args[0].decode(errors="replace") if isinstance(error.args[0], bytes) else error
        raise ConfigError(f"{path}, line {line}: text: RE2 does not know this expression ({reason})") from None
    return entry


def _expression(entry: RuleEntry) -> str:
    """What RE2 searches for; an exact text is among them only to be checked alike."""
    body = entry.text if entry.match == "regex" else re2.escape(entry.text)
    return f"(?:{body})" if entry.case else f"(?i:{body})"


def _options() -> re2.Options:
    options = re2.Options()
    options.log_errors = False
    options.max_mem = MAX_MEMORY
    return options
