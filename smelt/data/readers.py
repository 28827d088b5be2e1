"""Documents out of files, by their suffix: text, JSON lines, CSV, Parquet, plain or compressed.

Reads in bounded memory, whatever the size of the file. What is wrong with a file is said with its name and the
line, row or byte. Knows no tokenizer and not where the files come from.
"""

import codecs
import csv
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from smelt.data.chat import parse_messages, render_messages
from smelt.data.documents import Documents, Reading, pieces, whole
from smelt.errors import DataError

CHUNK_BYTES = 1 << 20
MAX_RECORD_BYTES = 32 << 20  # one line of JSON or one row of CSV is held in memory
ROWS_AT_ONCE = 256
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)

Records = Iterator[tuple[str, Any]]  # where it stands, for messages, and its value
Choose = Callable[[Sequence[str]], Sequence[str]]  # of a file's columns those that are wanted; DataError


@dataclass(frozen=True, slots=True)
class InputFile:
    """A file to read: `label` is what messages call it, `kind` a key of READERS."""

    path: Path
    label: str
    kind: str
    compression: str | None

    def chunks(self, reading: Reading) -> Iterator[bytes]:
        """The content, decompressed, a MiB at a time."""
        num_bytes_before = reading.num_bytes
        try:
            with self.path.open("rb") as raw, pa.input_stream(raw, compression=self.compression) as stream:
                while chunk := stream.read(CHUNK_BYTES):
                    reading.num_bytes = num_bytes_before + raw.tell()
                    yield chunk
        except OSError as error:
            at = f" after {reading.num_bytes - num_bytes_before:,} bytes" if self.compression else ""
            reading.reject(f"{self.label} cannot be read{at}: {error.strerror or error}")


def input_file(path: Path, label: str | None = None, name: str | None = None) -> InputFile:
    """How to read a file, by the suffixes of its name; one without a suffix that we know is text."""
    suffixes = PurePosixPath((name or path.name).lower()).suffixes
    compression = COMPRESSIONS.get(suffixes[-1]) if suffixes else None
    kind = suffixes[-2 if compression else -1] if len(suffixes) > bool(compression) else ""
    return InputFile(path, label or str(path), kind if kind in READERS else ".txt", compression)


def is_known(path: Path) -> bool:
    """Whether the name says that the file holds documents."""
    suffixes = [suffix for suffix in path.suffixes if suffix.lower() not in COMPRESSIONS]
    return bool(suffixes) and suffixes[-1].lower() in READERS


def read_file(file: InputFile, reading: Reading) -> Documents:
    """The documents of one file."""
    if file.path.stat().st_size == 0:
        reading.reject(f"{file.label} is empty")
        return
    yield from READERS[file.kind](file, reading)


# --- Text: a file is a document --------------------------------------------------------------------------


def read_text(file: InputFile, reading: Reading) -> Documents:
    """The whole file as one document."""
    return pieces(_decoded(file, reading))


def _decoded(file: InputFile, reading: Reading) -> Iterator[str]:
    rest, position = b"", 0  # position of the rest in the file
    for chunk in file.chunks(reading):
        if position == 0 and not rest and chunk.startswith(UTF16_MARKS):
            reading.reject(f"{file.label} is UTF-16, not UTF-8; convert it: iconv -f UTF-16 -t UTF-8")
            return
        if (nul := chunk.find(b"\0")) >= 0:
            reading.reject(f"{file.label}: byte {position + len(rest) + nul:,} is NUL, so this is not a text file")
            return
        rest += chunk
        text, num_used = _decode(rest, position, file.label, reading, final=False)
        yield text if position else text.removeprefix("\ufeff")
        rest, position = rest[num_used:], position + num_used
    yield _decode(rest, position, file.label, reading, final=True)[0]


def _decode(content: bytes, position: int, label: str, reading: Reading, *, final: bool) -> tuple[str, int]:
    """Text and the number of bytes used; what is no UTF-8 is rejected, and left out where that is allowed."""
    try:
        return codecs.utf_8_decode(content, "strict", final)
    except UnicodeDecodeError as error:
        at = position + error.start
        reading.reject(f"{label}: byte {at:,} (0x{content[error.start]:02x}) is not UTF-8: {error.reason}")
    text, num_used = codecs.utf_8_decode(content, "ignore", final)
    num_bad = codecs.utf_8_decode(content, "replace", final)[0].count("\ufffd") - text.count("\ufffd")
    reading.num_skipped += num_bad - 1
    return text, num_used


# --- Lines and records -----------------------------------------------------------------------------------


def _lines(file: InputFile, reading: Reading) -> Iterator[tuple[int, str]]:
    """Number and text of each line, with its line break."""
    for number, line in _raw_lines(file, reading):
        try:
            yield number, line.removeprefix(codecs.BOM_UTF8 if number == 1 else b"").decode("utf-8")
        except UnicodeDecodeError as error:
            byte = line[error.start]
            reading.reject(
                f"{file.label}, line {number:,}: byte {error.start + 1:,} of it (0x{byte:02x}) is not UTF-8: "
                f"{error.reason}"
            )


def _raw_lines(file: InputFile, reading: Reading) -> Iterator[tuple[int, bytes]]:
    number, rest, is_too_long = 1, b"", False
    for chunk in file.chunks(reading):
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            if not is_too_long:
                yield number, line + b"\n"
            number, is_too_long = number + 1, False
        if len(rest) > MAX_RECORD_BYTES and not is_too_long:
            reading.reject(f"{file.label}, line {number:,} is longer than {MAX_RECORD_BYTES >> 20} MiB")
            is_too_long = True
        rest = b"" if is_too_long else rest
    if rest:
        yield number, rest


def text_of(record: Any, column: str) -> str:
    """The text of a record: its column, or the turns of its `messages`. DataError where it has neither."""
    if not isinstance(record, dict):
        raise DataError(f"is not a record with a {column!r} but a {type(record).__name__}")
    if isinstance(record.get(column), str):
        text: str = record[column]
    elif "messages" in record and column not in record:
        text = render_messages(parse_messages(record["messages"]))
    elif column in record:
        raise DataError(f"{column!r} is not text but {record[column]!r:.40}")
    else:
        raise DataError(f"has no {column!r}, only {', '.join(map(repr, record)) or 'nothing'}; name it with --column")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"character {error.start:,} of {column!r} is a lone surrogate, not Unicode text") from None
    return text


def jsonl_records(file: InputFile, reading: Reading) -> Records:
    """The value of each line, whatever it is."""
    for number, line in _lines(file, reading):
        if not line.strip():
            continue
        where = f"{file.label}, line {number:,}"
        try:
            yield where, json.loads(line)
        except json.JSONDecodeError as error:
            reading.reject(f"{where} is not JSON: {error.msg} at column {error.colno:,}")
        except (ValueError, RecursionError) as error:  # numbers of too many digits, brackets nested too deep
            reading.reject(f"{where} is not JSON that can be read: {error}")


def read_jsonl(file: InputFile, reading: Reading) -> Documents:
    """A document per line: a JSON object with the text column, or with `messages`."""
    for where, record in jsonl_records(file, reading):
        try:
            yield from whole(text_of(record, reading.column))
        except DataError as error:
            reading.reject(f"{where}: {error}")


def csv_records(file: InputFile, reading: Reading, choose: Choose) -> Records:
    """The chosen columns of each row; the first row names them all."""
    csv.field_size_limit(MAX_RECORD_BYTES)
    lines = (line for _, line in _lines(file, reading))
    rows = csv.reader(lines, delimiter="\t" if file.kind == ".tsv" else ",", strict=True)
    try:
        header = next(rows, [])
    except csv.Error as error:
        raise DataError(f"{file.label}, line {rows.line_num:,}: {error}") from None
    indices = {column: header.index(column) for column in choose(header)}
    while True:
        first_line = rows.line_num + 1
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            reading.reject(f"{file.label}, row that begins on line {first_line:,}: {error}")
            continue
        where = f"{file.label}, line {first_line:,}"
        if row and len(row) != len(header):
            reading.reject(f"{where} has {len(row)} fields, but the header {len(header)}")
        elif row:
            yield where, {column: row[index] for column, index in indices.items()}


def read_csv(file: InputFile, reading: Reading) -> Documents:
    """A document per row: the text column, which the first row names."""

    def choose(columns: Sequence[str]) -> list[str]:
        _check_column(file, columns, reading.column)
        return [reading.column]

    for _, record in csv_records(file, reading, choose):
        yield from whole(record[reading.column])


def _check_column(file: InputFile, columns: Sequence[str], column: str) -> None:
    if column not in columns:
        raise DataError(
            f"{file.label} has no column {column!r}; its columns are {', '.join(columns)[:500]}; choose with --column"
        )


# --- Parquet ---------------------------------------------------------------------------------------------


def parquet_records(file: InputFile, reading: Reading, choose: Choose) -> Records:
    """The chosen columns of each row."""
    num_rows = 0
    try:
        with _seekable(file, reading) as content:
            for record in _rows(file, content, reading, choose):
                num_rows += 1
                yield f"{file.label}, row {num_rows:,}", record
    except (pa.ArrowException, OSError) as error:
        reading.reject(f"{file.label} is damaged Parquet, after row {num_rows:,}: {error}")


def read_parquet(file: InputFile, reading: Reading) -> Documents:
    """A document per row: the text column, or `messages`."""

    def choose(columns: Sequence[str]) -> list[str]:
        column = "messages" if reading.column not in columns and "messages" in columns else reading.column
        _check_column(file, columns, column)
        return [column]

    for where, record in parquet_records(file, reading, choose):
        try:
            yield from whole(text_of(record, reading.column))
        except DataError as error:
            reading.reject(f"{where}: {error}")


def _rows(file: InputFile, content: IO[bytes], reading: Reading, choose: Choose) -> Iterator[dict[str, Any]]:
    with pq.ParquetFile(content, buffer_size=CHUNK_BYTES) as parquet:
        columns = choose(parquet.schema_arrow.names)
        num_bytes_before, size = reading.num_bytes, file.path.stat().st_size
        num_rows = 0
        for batch in parquet.iter_batches(ROWS_AT_ONCE, columns=columns):
            yield from batch.to_pylist()
            num_rows += batch.num_rows
            reading.num_bytes = num_bytes_before + size * num_rows // parquet.metadata.num_rows


def _seekable(file: InputFile, reading: Reading) -> IO[bytes]:
    """The file itself, or a decompressed copy: Parquet begins to be read at its end."""
    if file.compression is None:
        return file.path.open("rb")
    copy = tempfile.TemporaryFile()  # noqa: SIM115 - the caller closes it
    for chunk in file.chunks(Reading(reading.on_error)):
        copy.write(chunk)
    return copy


READERS: dict[str, Callable[[InputFile, Reading], Documents]] = {
    ".txt": read_text,
    ".text": read_text,
    ".md": read_text,
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_jsonl,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".parquet": read_parquet,
}
