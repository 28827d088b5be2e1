"""What models write when they want a function called, read as ToolCalls; knows no templates but their texts.

Each family of models has a form of its own, a line in DIALECTS. A model's form is told by what its chat template
writes. Text that does not parse is not a call: it stays what the assistant said.
"""

import json
import re
import secrets
import string
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from smelt.types import ToolCall

Calls = tuple[ToolCall, ...]


@dataclass(frozen=True, slots=True)
class Dialect:
    """How calls are written: `read` gives what is left of a text, and the calls in it.

    Calls begin with one of the `markers`, or where the whole text begins with one of the `openings`: models leave the
    marker out, and so does a tokenizer to which it is a special token.
    """

    sign: str  # what a template of this dialect holds
    read: Callable[[str], tuple[str, Calls]]
    markers: tuple[str, ...] = ()
    openings: tuple[str, ...] = ()
    marks_within: tuple[str, ...] = ()  # that stand between the parts of a call


def dialect_of(template: str) -> Dialect | None:
    """How a model with this template writes calls; None where we do not know."""
    return next((dialect for dialect in DIALECTS.values() if dialect.sign in template), None)


class ToolCallStream:
    """Passes text on until a call begins; what may be the beginning of one is held back meanwhile."""

    def __init__(self, dialect: Dialect | None) -> None:
        self._dialect = dialect
        self._held = ""
        self._calls_begin = False
        self._has_shown = False

    def push(self, text: str) -> str:
        """The text that is surely not part of a call."""
        if self._dialect is None:
            return text
        self._held += text
        if self._calls_begin:
            return ""
        num_shown = len(self._held) - self._length_to_hold(self._dialect)
        shown, self._held = self._held[:num_shown], self._held[num_shown:]
        self._has_shown = self._has_shown or bool(shown)
        return shown

    def finish(self) -> tuple[str, Calls]:
        """The rest of the text, and the calls, when no more comes."""
        held, self._held = self._held, ""
        return self._dialect.read(held) if self._dialect else (held, ())

    def _length_to_hold(self, dialect: Dialect) -> int:
        text = self._held
        if not self._has_shown and _may_open(text.lstrip(), dialect.openings):
            self._calls_begin = text.lstrip().startswith(dialect.openings)
            return len(text)
        starts = [start for start in map(text.find, dialect.markers) if start >= 0]
        if starts:
            self._calls_begin = True
            return len(text) - min(starts)
        return max((_length_of_beginning(text, marker) for marker in dialect.markers), default=0)


def _may_open(text: str, openings: tuple[str, ...]) -> bool:
    return any(text.startswith(opening) or opening.startswith(text) for opening in openings)


def _length_of_beginning(text: str, marker: str) -> int:
    """Length of the longest end of the text that begins the marker."""
    longest = min(len(text), len(marker) - 1)
    return next((length for length in range(longest, 0, -1) if marker.startswith(text[-length:])), 0)


HERMES_CALL = re.compile(r"\s*<tool_call>\s*(.*?)\s*</tool_call>\s*", re.DOTALL)
XML_CALL = re.compile(r"\s*<tool_call>\s*<function=([^>\n]+)>(.*?)</function>\s*</tool_call>\s*", re.DOTALL)
XML_ARGUMENT = re.compile(r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>", re.DOTALL)

MISTRAL_CALL = re.compile(r"([\w.-]+)(?:\[CALL_ID\]\w*)?\[ARGS\]\s*(\{.*\})", re.DOTALL)


def _read_hermes(text: str) -> tuple[str, Calls]:
    """`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, several where there are several."""
    return _read_tagged(text, HERMES_CALL, lambda found: _call(_parsed(found[1]), "arguments"))


def _read_xml(text: str) -> tuple[str, Calls]:
    """`<tool_call><function=NAME><parameter=NAME>VALUE</parameter></function></tool_call>`."""
    return _read_tagged(text, XML_CALL, _xml_call)


def _read_tagged(
    text: str, pattern: re.Pattern[str], read: Callable[[re.Match[str]], ToolCall | None]
) -> tuple[str, Calls]:
    calls: list[ToolCall] = []

    def take(found: re.Match[str]) -> str:
        call = read(found)
        if call is None:
            return found[0]
        calls.append(call)
        return "\n"

    rest = pattern.sub(take, _closed(text))
    return (rest.strip(), tuple(calls)) if calls else (text, ())


def _closed(text: str) -> str:
    """The text with the last tag closed, which some models leave to the end of the turn."""
    is_open = text.rfind("<tool_call>") > text.rfind("</tool_call>")
    return f"{text}</tool_call>" if is_open else text


def _xml_call(found: re.Match[str]) -> ToolCall:
    arguments = {name: _value(value) for name, value in XML_ARGUMENT.findall(found[2])}
    return ToolCall(_openai_id(), found[1].strip(), json.dumps(arguments, ensure_ascii=False))


def _value(text: str) -> Any:
    """A number, a list, an object, true, false or null as such; anything else is a text."""
    parsed = _parsed(text)
    return text if parsed is _NOTHING else parsed


def _read_llama(text: str) -> tuple[str, Calls]:
    """`{"name": ..., "parameters": {...}}`, several with semicolons or line breaks between; a tag may come first."""
    body = text.strip().removeprefix("<|python_tag|>").removesuffix("<|eom_id|>")
    calls = [_call(value, "parameters") for value in _values_in(body)]
    return _all_or_text(text, calls)


def _read_mistral(text: str) -> tuple[str, Calls]:
    """`[TOOL_CALLS] [{"name": ..., "arguments": {...}}, ...]`, or `[TOOL_CALLS]NAME[ARGS]{...}` for each call.

    The ids are as its templates want them.
    """
    said, *bodies = text.split("[TOOL_CALLS]") if "[TOOL_CALLS]" in text else ("", text)
    values = [value for body in bodies for value in _mistral_values(body.strip())]
    rest, calls = _all_or_text(text, [_call(value, "arguments", _mistral_id) for value in values])
    return (said.strip() if calls else rest), calls


def _mistral_values(body: str) -> list[Any]:
    if found := MISTRAL_CALL.fullmatch(body):
        return [{"name": found[1], "arguments": _parsed(found[2])}]
    values = _parsed(body)
    return values if isinstance(values, list) else [_NOTHING]


def _all_or_text(text: str, calls: list[ToolCall | None]) -> tuple[str, Calls]:
    read = tuple(call for call in calls if call is not None)
    return ("", read) if read and len(read) == len(calls) else (text, ())


def _values_in(text: str) -> Iterator[Any]:
    """The JSON values in a text, one after the other; _NOTHING where it goes on with something else."""
    decoder = json.JSONDecoder()
    text = text.strip()
    while text:
        try:
            value, end = decoder.raw_decode(text)
        except (ValueError, RecursionError):
            yield _NOTHING
            return
        yield value
        text = text[end:].lstrip("; \t\r\n")


_NOTHING = object()


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return _NOTHING


def _openai_id() -> str:
    return f"call_{secrets.token_hex(12)}"


def _mistral_id() -> str:
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))


def _call(value: Any, arguments_key: str, new_id: Callable[[], str] = _openai_id) -> ToolCall | None:
    """The call that a JSON value stands for. Models mix up the two names of the arguments, and may leave out none."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or not value["name"]:
        return None
    other = {"arguments": "parameters", "parameters": "arguments"}[arguments_key]
    arguments = value.get(arguments_key, value.get(other, {}))
    if isinstance(arguments, str):
        arguments = _parsed(arguments)
    if not isinstance(arguments, dict):
        return None
    return ToolCall(new_id(), value["name"], json.dumps(arguments, ensure_ascii=False))


def _read_json(text: str) -> tuple[str, Calls]:
    """`{"name": ..., "arguments": {...}}` and nothing else."""
    return _all_or_text(text, [_call(value, "arguments") for value in _values_in(text)])


# What a grammar makes of a call that has to come, whatever the model's template teaches.
JSON_CALL = Dialect("", _read_json, openings=("{",))

# In this order: what a sign is looked for in may also hold a later one.
DIALECTS: dict[str, Dialect] = {
    "mistral": Dialect("[TOOL_CALLS]", _read_mistral, ("[TOOL_CALLS]",), ("[{",), ("[CALL_ID]", "[ARGS]")),
    "xml": Dialect("<function=", _read_xml, ("<tool_call>",)),
    "hermes": Dialect("<tool_call>", _read_hermes, ("<tool_call>",)),
    "llama": Dialect('"parameters"', _read_llama, ("<|python_tag|>",), ("{",)),
}
