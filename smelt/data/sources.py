"""Where documents come from: a file, a folder, a URL, the Hugging Face hub, or what Python carries.

Knows no tokenizer. A new kind of source is a function and a line in SOURCES.
"""

import email.message
import http.client
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Any
from urllib.error import URLError
from urllib.parse import unquote, urlsplit
from urllib.request import Request, urlopen

from smelt import __version__
from smelt.data import pydoc_corpus
from smelt.data.documents import Documents, Reading, Source, whole
from smelt.data.readers import CHUNK_BYTES, READERS, InputFile, input_file, is_known, read_file, text_of
from smelt.errors import DataError, MissingDependency, NotFound

Progress = Callable[[str, int, int | None], None]  # what is being done, bytes done, bytes in all or None
COMPRESSION_RATIO = 4  # of text, roughly
TIMEOUT_SECONDS = 30.0  # without a byte
SUFFIX_OF_TYPE = {
    "text/csv": ".csv",
    "text/tab-separated-values": ".tsv",
    "application/json": ".json",
    "application/jsonl": ".jsonl",
    "application/x-ndjson": ".jsonl",
    "application/vnd.apache.parquet": ".parquet",
}
HUB_SPLITS = ("train", "validation", "valid", "test")


@dataclass(frozen=True, slots=True)
class Origin:
    """A source that is opened in a way of its own, and what everybody calls it."""

    name: str
    open: Callable[[Path, Progress], Source]  # with a folder for what must be downloaded first


def origin_of(spec: str) -> Origin:
    """The source that a command or a config names."""
    return Origin(full_name(spec), partial(open_source, spec))


def open_source(spec: str, scratch: Path, progress: Progress) -> Source:
    """What a source names. `scratch` is a folder for what must be downloaded first.

    NotFound where it does not exist, DataError where it cannot be fetched.
    """
    scheme = spec.partition(":")[0].lower()
    if scheme in SOURCES:
        return SOURCES[scheme](spec, scratch, progress)
    return local_source(Path(spec).expanduser())


def full_name(spec: str) -> str:
    """The source as anyone can find it later: paths from the root on."""
    return spec if spec.partition(":")[0].lower() in SOURCES else str(Path(spec).expanduser().resolve())


def identity(spec: str) -> str:
    """What makes a source the same as before: its name, and for local files sizes and times too."""
    if spec.partition(":")[0].lower() in SOURCES:
        return f"{spec} {sys.version_info[:2]}" if spec.startswith("builtin:") else spec
    stats = [(str(file.path), file.path.stat()) for file in local_files(Path(full_name(spec)))]
    return repr([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats])


# --- Files -----------------------------------------------------------------------------------------------


def local_source(path: Path) -> Source:
    """A file, or all files of a folder whose suffix we know, in the order of their paths."""
    return source_of(local_files(path))


def source_of(files: list[InputFile]) -> Source:
    """The documents of some files, one file after the other."""

    def read(reading: Reading) -> Documents:
        for file in files:
            yield from read_file(file, reading)

    sizes = [file.path.stat().st_size for file in files]
    is_packed = [file.compression is not None or file.kind == ".parquet" for file in files]
    num_text_bytes = sum(n * COMPRESSION_RATIO if packed else n for n, packed in zip(sizes, is_packed, strict=True))
    return Source(read, num_bytes=sum(sizes), num_text_bytes=num_text_bytes)


def local_files(path: Path) -> list[InputFile]:
    """The files that a path stands for. NotFound where there is nothing, DataError where nothing is known."""
    if path.is_file():
        return [input_file(path)]
    if not path.is_dir():
        kind = "is neither a file nor a folder" if path.exists() else "does not exist"
        raise NotFound(f"{path} {kind}; a source is a file, a folder, a URL, hf:ORG/NAME or builtin:pydoc")
    found = [
        Path(folder) / name
        for folder, folders, names in os.walk(path, onerror=_refuse)
        if not (folders.sort() or any(part.startswith(".") for part in Path(folder).relative_to(path).parts))
        for name in sorted(names)
    ]
    files = [input_file(file) for file in found if is_known(file) and not file.name.startswith(".") and file.is_file()]
    if not files:
        raise DataError(f"{path} holds no file that ends in {', '.join(READERS)} (or those with .gz or .zst)")
    return files


def _refuse(error: OSError) -> None:
    raise DataError(f"{error.filename} cannot be read: {error.strerror}") from None


# --- The web ---------------------------------------------------------------------------------------------


def url_source(spec: str, scratch: Path, progress: Progress, opened: Callable[..., Any] = urlopen) -> Source:
    """A file behind an http(s) address, downloaded into `scratch`; `opened` is urllib's urlopen or its like."""
    return source_of([download(spec, scratch, progress, opened)])


def download(spec: str, scratch: Path, progress: Progress, opened: Callable[..., Any] = urlopen) -> InputFile:
    """What lies behind an http(s) address, as a file in `scratch`. DataError where it cannot be fetched."""
    request = Request(spec, headers={"User-Agent": f"smelt/{__version__}"})
    target = scratch / "download"
    scratch.mkdir(parents=True, exist_ok=True)
    try:
        with opened(request, timeout=TIMEOUT_SECONDS) as response:
            name = remote_name(spec, response.headers)
            _download(response, target, spec, progress)
    except DataError:
        raise
    except ValueError as error:
        raise DataError(f"{spec} is not an address that can be fetched: {error}") from None
    except (URLError, TimeoutError, http.client.HTTPException, ConnectionError) as error:
        raise DataError(f"{spec} cannot be fetched: {getattr(error, 'reason', None) or error}") from None
    return input_file(target, label=spec, name=name)


def remote_name(url: str, headers: email.message.Message) -> str:
    """A file name whose suffixes say how to read it: from the address, else from the content's type."""
    name = PurePosixPath(unquote(urlsplit(url).path)).name
    content_type = headers.get_content_type() if headers.get("Content-Type") else ""
    if not is_known(Path(name)):
        if content_type == "text/html":
            raise DataError(f"{url} is a web page, not data; give the address of the file itself")
        name += SUFFIX_OF_TYPE.get(content_type, "")
    encoding = headers.get("Content-Encoding", "")
    return name + ".gz" if encoding == "gzip" else name


def _download(response: Any, target: Path, url: str, progress: Progress) -> None:
    length = response.headers.get("Content-Length")
    num_expected = int(length) if length else None
    num_bytes = 0
    with target.open("wb") as file:
        while chunk := response.read(CHUNK_BYTES):
            file.write(chunk)
            num_bytes += len(chunk)
            progress("downloading", num_bytes, num_expected)
    if num_expected is not None and num_bytes != num_expected:
        raise DataError(f"{url} broke off after {num_bytes:,} of {num_expected:,} bytes; try again")


# --- The Hugging Face hub --------------------------------------------------------------------------------


def hub_source(spec: str, _scratch: Path, _progress: Progress) -> Source:
    """A dataset of the hub, `hf:ORG/NAME[:config][:split]`, streamed: it is not kept on the disk."""
    parse_hub_spec(spec)
    _datasets_library()  # what is missing is said before anything is read

    def read(reading: Reading) -> Documents:
        for where, row, _ in hub_rows(spec):
            try:
                text = text_of(row, reading.column)
            except DataError as error:
                reading.reject(f"{where}: {error}")
                continue
            reading.num_bytes += len(text)
            yield from whole(text)

    return Source(read)


def hub_rows(spec: str) -> Iterator[tuple[str, dict[str, Any], Mapping[str, Any] | None]]:
    """(where, row, what the columns are) of a dataset of the hub, streamed. DataError where it cannot be read."""
    name, config, split = parse_hub_spec(spec)
    try:
        rows = _datasets_library().load_dataset(name, config, split=split, streaming=True)
        for number, row in enumerate(rows, start=1):
            yield f"{spec}, row {number:,}", row, getattr(rows, "features", None)
    except (OSError, ValueError, LookupError) as error:
        raise DataError(
            f"{spec} cannot be read: {error} (offline, the hub's cache is what HF_HOME points to)"
        ) from None


def parse_hub_spec(spec: str) -> tuple[str, str | None, str]:
    """Name, config and split; a single part after the name is a split where it is called like one."""
    name, *parts = spec.split(":")[1:]
    if not name or len(parts) > 2:
        raise DataError(f"{spec} is not hf:ORG/NAME[:config][:split]")
    if len(parts) == 1 and parts[0] in HUB_SPLITS:
        return name, None, parts[0]
    config, split = [*parts, "", ""][:2]
    return name, config or None, split or "train"


def _datasets_library() -> ModuleType:
    try:
        return import_module("datasets")
    except ImportError:
        raise MissingDependency("hf: sources need the datasets library: pip install 'smelt[hub]'") from None


# --- What Python carries ---------------------------------------------------------------------------------


def builtin_source(spec: str, _scratch: Path, _progress: Progress) -> Source:
    """A corpus that comes with Python, `builtin:pydoc`."""
    name = spec.partition(":")[2]
    if name not in BUILTINS:
        raise NotFound(f"{spec} does not exist; there is {', '.join(f'builtin:{known}' for known in BUILTINS)}")
    texts = BUILTINS[name]()

    def read(reading: Reading) -> Documents:
        for text in texts:
            reading.num_bytes += len(text.encode("utf-8"))
            yield from whole(text)

    num_bytes = sum(len(text.encode("utf-8")) for text in texts)
    return Source(read, num_bytes, num_bytes)


BUILTINS: dict[str, Callable[[], list[str]]] = {"pydoc": pydoc_corpus.read_corpus}

SOURCES: dict[str, Callable[[str, Path, Progress], Source]] = {
    "http": url_source,
    "https": url_source,
    "hf": hub_source,
    "builtin": builtin_source,
}
