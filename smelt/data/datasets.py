"""Datasets: folders of tokenized documents, split for training and validation; knows no model and no settings.

A dataset is a folder of shards, a tokenizer, and `dataset.json`, which tells what they must be. It never changes
once it is there; `preparation` makes it.
"""

import fcntl
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
from pydantic import Field, ValidationError

from smelt.configs import Config
from smelt.data.documents import Documents, pieces
from smelt.data.shards import START_DTYPE, Shard, TokenSplit
from smelt.data.staging import remove_folder
from smelt.data.tokenizers import StreamDecoder, Tokenizer, load_tokenizer
from smelt.errors import DataError, InUse, InvalidInput, NotFound
from smelt.types import LOCAL_OWNER

MANIFEST_FILE = "dataset.json"
TOKENIZER_FOLDER = "tokenizer"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
TOKENS_AT_ONCE = 1 << 16  # of a document that is decoded
SPLITS: tuple[Literal["train", "val"], ...] = ("train", "val")


class Manifest(Config):
    """What `dataset.json` holds."""

    format_version: Literal[1] = 1
    source: str = Field(description="where the documents came from")
    tokenizer: str = Field(description="name of the tokenizer")
    tokenizer_sha256: str = Field(description="fingerprint of what each id stands for")
    vocab_size: int = Field(ge=1)
    dtype: Literal["uint16", "uint32"] = Field(description="little-endian type of the ids on disk")
    shard_tokens: int = Field(ge=1, description="tokens in every shard of a split but its last")
    val_fraction: float = Field(gt=0, lt=1)
    num_source_bytes: int = Field(ge=0, description="bytes read from the source")
    num_skipped: int = Field(ge=0, description="bad records left out")
    created: str = Field(description="UTC time, ISO 8601")
    smelt_version: str
    owner: str = Field(LOCAL_OWNER, description="whose it is; that of this machine's terminals is for all")
    job: str | None = Field(None, description="the request to a server that made it")
    train: tuple[Shard, ...]
    val: tuple[Shard, ...]

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """The type on disk as NumPy says it."""
        return np.dtype(self.dtype).newbyteorder("<")


class Dataset:
    """A dataset on disk. Nothing but the manifest is read before it is asked for."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest

    @property
    def name(self) -> str:
        """The name of its folder."""
        return self.folder.name

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that its ids are of."""
        return load_tokenizer(self.folder / TOKENIZER_FOLDER)

    @cached_property
    def sha256(self) -> str:
        """A hash of all tokens in their order and of what they stand for: equal for equal data."""
        parts = [self.manifest.tokenizer_sha256, self.manifest.dtype]
        parts += [shard.sha256 for split in SPLITS for shard in self._shards(split)]
        return hashlib.sha256("\n".join(parts).encode("ascii")).hexdigest()

    def split(self, name: Literal["train", "val"]) -> TokenSplit:
        """All shards of a split as one stream."""
        return TokenSplit(self.folder, self._shards(name), self.manifest.numpy_dtype)

    def shard(self, name: str) -> TokenSplit:
        """A single shard, such as `train-000003`. NotFound where there is none of that name."""
        known = {shard.name: shard for split in SPLITS for shard in self._shards(split)}
        if name not in known:
            raise NotFound(f"{self.name} has no shard {name!r}; it has {', '.join(known)}")
        return TokenSplit(self.folder, [known[name]], self.manifest.numpy_dtype)

    def texts(self, name: Literal["train", "val"], start: int = 0) -> Documents:
        """The documents of a split as text again, in pieces, from number `start` on."""
        for tokens in self.split(name).documents(start):
            yield from pieces(self._decode(tokens))

    def verify(self) -> None:
        """Compare every file with its hash in the manifest. DataError names the first that differs."""
        for shard in (*self.manifest.train, *self.manifest.val):
            for suffix, expected in (("bin", shard.sha256), ("idx", shard.index_sha256)):
                path = self.folder / f"{shard.name}.{suffix}"
                if file_sha256(path) != expected:
                    raise DataError(f"{path} is damaged: its sha256 is not the one in {MANIFEST_FILE}; add it again")

    def _shards(self, name: Literal["train", "val"]) -> tuple[Shard, ...]:
        return self.manifest.train if name == "train" else self.manifest.val

    def _decode(self, tokens: Any) -> Iterator[str]:
        stream = StreamDecoder(self.tokenizer)
        for first in range(0, len(tokens), TOKENS_AT_ONCE):
            yield stream.push(tokens[first : first + TOKENS_AT_ONCE].tolist())
        yield stream.finish()


def open_dataset(folder: Path) -> Dataset:
    """The dataset in a folder, its files checked for their sizes.

    NotFound where there is none; DataError where it is damaged.
    """
    path = folder / MANIFEST_FILE
    if not path.is_file():
        raise NotFound(f"there is no dataset {folder.name!r} in {folder.parent}; see `smelt data ls`")
    try:
        manifest = Manifest.model_validate_json(path.read_bytes())
    except ValidationError as report:
        problem = report.errors()[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise DataError(f"{path} is damaged: {where} {problem['msg']}; remove the dataset and add it again") from None
    for shard in (*manifest.train, *manifest.val):
        _check_size(folder / f"{shard.name}.bin", shard.num_tokens * manifest.numpy_dtype.itemsize)
        _check_size(folder / f"{shard.name}.idx", shard.num_documents * START_DTYPE.itemsize)
    return Dataset(folder, manifest)


def _check_size(path: Path, expected: int) -> None:
    found = path.stat().st_size if path.is_file() else None
    if found != expected:
        said = "is missing" if found is None else f"has {found:,} bytes instead of {expected:,}"
        raise DataError(f"{path} {said}; the dataset is damaged: remove it and add it again")


def file_sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(manifest: Manifest, folder: Path) -> None:
    """Write `dataset.json`, which makes a folder a dataset."""
    text = json.dumps(manifest.model_dump(mode="json"), indent=2)
    (folder / MANIFEST_FILE).write_text(text + "\n", encoding="utf-8")


# --- Names -----------------------------------------------------------------------------------------------


def dataset_folder(datasets_folder: Path, name: str) -> Path:
    """Where the dataset of that name lies. InvalidInput for names that are none, so that no name leaves the folder."""
    if not NAME.fullmatch(name):
        raise InvalidInput(
            f"{name!r} is not a name for a dataset: use up to 64 letters, digits, dots, dashes and underscores, "
            f"with a letter or digit first"
        )
    return datasets_folder / name


def list_datasets(datasets_folder: Path) -> list[str]:
    """Names of all datasets, damaged ones too, in alphabetical order."""
    if not datasets_folder.is_dir():
        return []
    return sorted(path.parent.name for path in datasets_folder.glob(f"*/{MANIFEST_FILE}") if _is_name(path.parent.name))


def _is_name(name: str) -> bool:
    return NAME.fullmatch(name) is not None


@contextmanager
def kept(folder: Path) -> Iterator[None]:
    """Nobody, in any process, removes the dataset in this folder while the block runs. NotFound where it is gone."""
    with _manifest_of(folder) as manifest:
        fcntl.flock(manifest, fcntl.LOCK_SH)
        with _manifest_of(folder):  # it may have been removed while we waited
            pass
        yield


def remove_dataset(datasets_folder: Path, name: str) -> None:
    """Remove a dataset and its files. NotFound where there is none of that name, InUse while a run trains on it."""
    folder = dataset_folder(datasets_folder, name)
    with _manifest_of(folder) as manifest:
        try:
            fcntl.flock(manifest, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InUse(f"dataset {name!r} is in use: a run trains on it now; cancel the run first") from None
        remove_folder(folder)


def _manifest_of(folder: Path) -> IO[bytes]:
    try:
        return (folder / MANIFEST_FILE).open("rb")
    except (FileNotFoundError, NotADirectoryError):
        raise NotFound(f"there is no dataset {folder.name!r} in {folder.parent}; see `smelt data ls`") from None
