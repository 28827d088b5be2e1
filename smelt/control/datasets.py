"""Datasets as everybody sees them: what there is, rows to look at, removal; knows their folders, no HTTP and no torch.

Those that this machine's terminals made are for all; one that was asked for with a key is its owner's.
"""

from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Literal

from smelt.data.datasets import Dataset, dataset_folder, list_datasets, open_dataset, remove_dataset
from smelt.data.tokenizers import StreamDecoder
from smelt.errors import DataError, InvalidInput, NotFound
from smelt.types import LOCAL_OWNER

MAX_ROWS = 100
MAX_ROW_CHARS = 4000


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetInfo:
    """What a dataset is. With a `problem` its files are damaged, and little else is known."""

    name: str
    owner: str = LOCAL_OWNER
    folder: str
    num_bytes: int  # on the disk
    problem: str | None = None
    source: str = ""
    created: float = 0.0  # seconds since 1970
    tokenizer: str = ""
    vocab_size: int = 0
    dtype: str = ""
    num_source_bytes: int = 0
    num_skipped: int = 0  # bad records that were left out
    num_train_tokens: int = 0
    num_train_documents: int = 0
    num_val_tokens: int = 0
    num_val_documents: int = 0


@dataclass(frozen=True, slots=True)
class Row:
    """A document of a dataset; `is_cut`: only its beginning."""

    index: int
    num_tokens: int
    text: str
    is_cut: bool


def infos(datasets_folder: Path, owner: str | None = None) -> list[DatasetInfo]:
    """Every dataset that an owner may use, or all, in alphabetical order."""
    found = []
    for name in list_datasets(datasets_folder):
        try:
            found.append(info(datasets_folder, name))
        except NotFound:  # removed just now
            continue
    return [each for each in found if is_for(each.owner, owner)]


def info(datasets_folder: Path, name: str, owner: str | None = None) -> DatasetInfo:
    """What one dataset is. NotFound where there is none of that name for the owner."""
    folder = dataset_folder(datasets_folder, name)
    num_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    try:
        dataset = open_dataset(folder)
    except DataError as error:
        return DatasetInfo(name=name, folder=str(folder), num_bytes=num_bytes, problem=str(error))
    check_for(dataset, owner)
    manifest, train, val = dataset.manifest, dataset.split("train"), dataset.split("val")
    return DatasetInfo(
        name=name,
        owner=manifest.owner,
        folder=str(folder),
        num_bytes=num_bytes,
        source=manifest.source,
        created=datetime.fromisoformat(manifest.created).timestamp(),
        tokenizer=manifest.tokenizer,
        vocab_size=manifest.vocab_size,
        dtype=manifest.dtype,
        num_source_bytes=manifest.num_source_bytes,
        num_skipped=manifest.num_skipped,
        num_train_tokens=train.num_tokens,
        num_train_documents=train.num_documents,
        num_val_tokens=val.num_tokens,
        num_val_documents=val.num_documents,
    )


def open_for(datasets_folder: Path, name: str, owner: str | None) -> Dataset:
    """A dataset that an owner may use (None: anybody may). NotFound, also for another owner's; DataError if damaged."""
    dataset = open_dataset(dataset_folder(datasets_folder, name))
    check_for(dataset, owner)
    return dataset


def check_for(dataset: Dataset, owner: str | None) -> None:
    """NotFound where a dataset is neither the owner's nor for all."""
    if not is_for(dataset.manifest.owner, owner):
        raise no_such_dataset(dataset.name)


def is_for(dataset_owner: str, owner: str | None) -> bool:
    """Whether an owner may use a dataset of another."""
    return owner is None or dataset_owner in (owner, LOCAL_OWNER)


def no_such_dataset(name: str) -> NotFound:
    """What to say for an unknown name, and for one that is not the asker's."""
    return NotFound(f"there is no dataset {name!r}; see `smelt data ls`, or /v1/datasets")


def rows(
    dataset: Dataset, split: Literal["train", "val"], offset: int = 0, limit: int = 10, max_chars: int = MAX_ROW_CHARS
) -> list[Row]:
    """Documents of a split as text, from number `offset` on, the beginnings of long ones."""
    tokens = dataset.split(split)
    if offset >= tokens.num_documents:
        return []
    found = []
    for index, document in enumerate(islice(tokens.documents(offset), limit), start=offset):
        text = StreamDecoder(dataset.tokenizer).push(document[:max_chars].tolist())  # a token is a character or more
        is_cut = len(document) > max_chars or len(text) > max_chars
        found.append(Row(index, len(document), text[:max_chars], is_cut))
    return found


def remove(datasets_folder: Path, name: str, owner: str | None = None) -> None:
    """Remove a dataset and its files.

    NotFound where there is none of that name, or it is another owner's; InUse while a run trains on it.
    """
    found = info(datasets_folder, name, owner)
    if owner is not None and found.owner != owner:
        raise (
            no_such_dataset(name)
            if not is_for(found.owner, owner)
            else InvalidInput(
                f"dataset {name!r} is for all and not yours: an administrator may remove it", param="name"
            )
        )
    remove_dataset(datasets_folder, name)
