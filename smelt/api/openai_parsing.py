"""JSON of OpenAI's clients as bodies: what is refused by name, and how a fault is told; knows no route's parameters.

What we do not support is refused unless its value asks for what happens anyway. Nothing is ignored.
"""

from functools import cache
from typing import Any, TypeVar

import msgspec
from pydantic import BaseModel, ConfigDict, ValidationError

from smelt.errors import InvalidInput

SHOWN_CHARS = 60

# By the name of a parameter: the values with which it is harmless, besides null.
Neutral = dict[str, tuple[Any, ...]]

B = TypeVar("B", bound=BaseModel)


class Body(BaseModel):
    """Strict JSON: no text where a number is due. Other fields are kept, to be refused by name."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False, hide_input_in_errors=True)


def parse(body_class: type[B], raw: bytes, alternatives: dict[str, str]) -> B:
    """The body of a request. InvalidInput says what is wrong, and names the parameter.

    `alternatives` says what a parameter may be, where it may be several things and pydantic would tell of each.
    """
    try:
        return body_class.model_validate_json(raw)
    except ValidationError as report:
        raise _explained(report, alternatives) from None


def object_of(raw: bytes) -> dict[str, Any]:
    """A JSON object as it came, without what is null. InvalidInput where it is none."""
    try:
        given = msgspec.json.decode(raw)
    except (msgspec.DecodeError, RecursionError) as error:
        raise InvalidInput(f"the body is not JSON that we can read: {error}") from None
    if not isinstance(given, dict):
        raise InvalidInput("the body must be a JSON object")
    return {name: value for name, value in given.items() if value is not None}


def check_neutral(given: dict[str, Any] | None, neutral: Neutral, place: str = "") -> None:
    """InvalidInput for fields that we do not know, or know and lack."""
    for name, value in (given or {}).items():
        if name not in neutral:
            shown = name[:SHOWN_CHARS]
            raise InvalidInput(f"unknown parameter {place}{shown}; leave it out", f"{place}{shown}")
        if value is not None and not any(type(value) is type(each) and value == each for each in neutral[name]):
            raise unsupported(f"{place}{name}")


def unsupported(param: str) -> InvalidInput:
    """What is said of a parameter that we know and lack."""
    return InvalidInput(f"{param} is not supported; leave it out", param)


@cache
def schema_of(body_class: type[BaseModel]) -> dict[str, Any]:
    """The JSON schema of a body, in one piece, for OpenAPI's document."""
    schema = body_class.model_json_schema()
    definitions = schema.pop("$defs", {})
    return dict(_inlined(schema, definitions))


def _inlined(schema: Any, definitions: dict[str, Any]) -> Any:
    if isinstance(schema, list):
        return [_inlined(each, definitions) for each in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return _inlined(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    return {name: _inlined(value, definitions) for name, value in schema.items()}


def _explained(report: ValidationError, alternatives: dict[str, str]) -> InvalidInput:
    """The first fault as a sentence with the parameter's name."""
    fault = report.errors(include_url=False, include_input=False, include_context=False)[0]
    place, message = [str(part) for part in fault["loc"]], fault["msg"]
    if fault["type"] == "json_invalid":
        return InvalidInput(f"the body is not JSON that we can read: {message.removeprefix('Invalid JSON: ')}")
    if not place:
        return InvalidInput("the body must be a JSON object")
    for depth, name in enumerate(place):
        if name in alternatives and fault["type"] != "missing":
            param = ".".join(place[: depth + 1])
            return InvalidInput(f"{param} must be {alternatives[name]}", param)
    param = ".".join(place)
    if fault["type"] == "missing":
        return InvalidInput(f"{param} is missing", param)
    verb = message.partition(" should ")[2]
    return InvalidInput(f"{param} should {verb}" if verb else f"{param}: {message}", param)
