"""Multipart forms on their way in: fields in memory, one file handed on piece by piece; knows no field's meaning.

A file never lies in memory or in a temporary folder of the system's: whoever takes it decides where it goes.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from smelt.api.streaming import ClientLeft
from smelt.errors import InvalidInput, TooLarge, UnsupportedEncoding

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

MAX_FIELDS = 100
MAX_FIELD_BYTES = 2**16

Sink = Callable[[bytes], Awaitable[None]]


@dataclass(slots=True)
class Form:
    """What a form says, and the name of the file that came with it: None where none did."""

    fields: dict[str, str] = field(default_factory=dict)
    filename: str | None = None


async def read_form(request: Request, file_field: str, take: Sink, texts: tuple[str, ...] = ()) -> Form:
    """The form of a request; `take` gets the file's pieces. InvalidInput, TooLarge, UnsupportedEncoding, ClientLeft.

    `texts` are fields that may come as small files, and are read as any other field.
    """
    reader = _Reader(file_field, texts)
    parser = MultipartParser(_boundary(request), reader.callbacks)
    arriving = True
    while arriving:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientLeft
        try:
            parser.write(message.get("body", b""))
        except FormParserError as error:
            raise InvalidInput(f"the body is not the form that its Content-Type announces: {error}") from None
        if reader.pieces:
            await take(b"".join(reader.pieces))
            reader.pieces.clear()
        arriving = message.get("more_body", False)
    if not reader.has_ended:
        raise InvalidInput("the form is cut short: its last boundary is missing")
    return reader.form


def _boundary(request: Request) -> bytes:
    kind, options = parse_options_header(request.headers.get("content-type"))
    if kind != b"multipart/form-data":
        raise UnsupportedEncoding("send the file as a form, with `Content-Type: multipart/form-data`")
    if not options.get(b"boundary"):
        raise InvalidInput("the Content-Type of the form names no boundary")
    return options[b"boundary"]


class _Reader:
    """Takes what the parser finds. `pieces` are those of the file since somebody took them."""

    def __init__(self, file_field: str, texts: tuple[str, ...] = ()) -> None:
        self.form = Form()
        self.pieces: list[bytes] = []
        self.has_ended = False
        self._file_field = file_field
        self._texts = texts
        self._header, self._value = b"", b""
        self._disposition = b""
        self._name = ""
        self._is_file = False
        self._data = bytearray()
        self.callbacks: MultipartCallbacks = {
            "on_part_begin": self._begin_part,
            "on_header_field": self._take_header,
            "on_header_value": self._take_value,
            "on_header_end": self._end_header,
            "on_headers_finished": self._begin_data,
            "on_part_data": self._take_data,
            "on_part_end": self._end_part,
            "on_end": self._end,
        }

    def _begin_part(self) -> None:
        self._disposition, self._data = b"", bytearray()

    def _take_header(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _take_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _end_header(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = self._value
        self._header, self._value = b"", b""

    def _begin_data(self) -> None:
        _, options = parse_options_header(self._disposition)
        if b"name" not in options:
            raise InvalidInput("a part of the form has no name")
        self._name = _text(options[b"name"])
        self._is_file = b"filename" in options and self._name not in self._texts
        if not self._is_file:
            return
        if self._name != self._file_field or self.form.filename is not None:
            raise InvalidInput(f"the form may have one file, named {self._file_field!r}", self._name)
        self.form.filename = _text(options[b"filename"])

    def _take_data(self, data: bytes, start: int, end: int) -> None:
        if self._is_file:
            self.pieces.append(data[start:end])
            return
        self._data += data[start:end]
        if len(self._data) > MAX_FIELD_BYTES:
            raise TooLarge(f"{self._name[:80]} has more than {MAX_FIELD_BYTES:,} bytes", self._name)

    def _end_part(self) -> None:
        if self._is_file:
            return
        if len(self.form.fields) >= MAX_FIELDS:
            raise TooLarge(f"a form may have {MAX_FIELDS} fields")
        self.form.fields[self._name] = _text(bytes(self._data))

    def _end(self) -> None:
        self.has_ended = True


def _text(raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        raise InvalidInput("a name or a field of the form is not UTF-8") from None
