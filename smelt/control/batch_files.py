"""The files of a batch: its input checked line by line, and what came of it as lines; knows no ledger and no endpoint.

Each line of an input is `{"custom_id": ..., "method": "POST", "url": ENDPOINT, "body": {...}}`. What is wrong with a
body is its own answer's business, so that one bad request does not stop the others.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import msgspec

MAX_REQUESTS = 50_000
MAX_LINE_BYTES = 2**23  # as the body of a request may have
MAX_ERRORS = 100  # that are told of one file
MAX_ID_CHARS = 512


class InputLine(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A request of a batch, as its sender writes it."""

    custom_id: str
    method: str
    url: str
    body: msgspec.Raw


class LineError(msgspec.Struct, frozen=True):
    """What is wrong with a line; `line` None: with the whole file."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


class Outcome(msgspec.Struct, frozen=True):
    """The answer to a line: a status of HTTP, and a body as JSON."""

    status: int
    body: bytes


@dataclass(slots=True)
class Input:
    """What a look through a whole input has found. `model` None: several, or none that could be read."""

    num_requests: int = 0
    model: str | None = None
    errors: list[LineError] = field(default_factory=list)


class _Named(msgspec.Struct):
    model: str | None = None


def examine(path: Path, endpoint: str) -> Input:
    """Look through an input: how many requests it has, and its first faults."""
    found = Input()
    seen: dict[str, int] = {}
    models: set[str | None] = set()
    with path.open("rb") as file:
        for number, raw in numbered(file):
            found.num_requests += 1
            if found.num_requests > MAX_REQUESTS:
                found.errors = [LineError("too_many_requests", f"a batch may have {MAX_REQUESTS:,} requests", number)]
                return found
            line = _read(number, raw, endpoint, seen)
            if isinstance(line, LineError):
                found.errors.append(line)
                if len(found.errors) == MAX_ERRORS:
                    return found
            else:
                seen[line.custom_id] = number
                models.add(_model_of(line))
    if not found.num_requests:
        found.errors = [LineError("empty_file", "the file has no requests: write one JSON object per line")]
    found.model = models.pop() if len(models) == 1 else None
    return found


def numbered(file: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """(number, content) of each line that is not blank, from 1; one beyond the limit ends one byte behind it."""
    number = 0
    while raw := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        while len(raw) > MAX_LINE_BYTES and not raw.endswith(b"\n"):
            if (rest := file.readline(MAX_LINE_BYTES)).endswith(b"\n") or not rest:
                break
        if raw.strip():
            yield number, raw


def _read(number: int, raw: bytes, endpoint: str, seen: dict[str, int]) -> InputLine | LineError:
    if len(raw) > MAX_LINE_BYTES:
        return LineError("line_too_long", f"line {number} has more than {MAX_LINE_BYTES:,} bytes", number)
    try:
        line = msgspec.json.decode(raw, type=InputLine)
    except (msgspec.ValidationError, msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        return LineError("invalid_json_line", f"line {number} is no request: {error}", number)
    if not 0 < len(line.custom_id) <= MAX_ID_CHARS:
        text = f"line {number}: custom_id has 1 to {MAX_ID_CHARS} characters"
        return LineError("invalid_custom_id", text, number, "custom_id")
    if line.custom_id in seen:
        text = f"line {number}: custom_id {line.custom_id[:80]!r} is that of line {seen[line.custom_id]} too"
        return LineError("duplicate_custom_id", text, number, "custom_id")
    if line.method != "POST":
        return LineError("invalid_method", f'line {number}: method must be "POST"', number, "method")
    if line.url != endpoint:
        text = f"line {number}: url must be the batch's endpoint, {endpoint}, not {line.url[:80]!r}"
        return LineError("invalid_url", text, number, "url")
    if not bytes(line.body).startswith(b"{"):
        return LineError("invalid_body", f"line {number}: body must be an object", number, "body")
    return line


def _model_of(line: InputLine) -> str | None:
    try:
        return msgspec.json.decode(line.body, type=_Named).model
    except msgspec.DecodeError:
        return None


def output_line(future_id: str, custom_id: str, outcome: Outcome) -> bytes:
    """An answer as a line of an output file, or, where it is a failure, of an error file."""
    response = {
        "status_code": outcome.status,
        "request_id": f"req_{future_id}",
        "body": msgspec.Raw(outcome.body),
    }
    return _line(future_id, custom_id, response, None)


def unanswered_line(line_id: str, custom_id: str, code: str, message: str) -> bytes:
    """A request that got no answer, as a line of an error file."""
    return _line(line_id, custom_id, None, {"code": code, "message": message})


def _line(line_id: str, custom_id: str, response: object, error: object) -> bytes:
    told = {"id": f"batch_req_{line_id}", "custom_id": custom_id, "response": response, "error": error}
    return msgspec.json.encode(told) + b"\n"
