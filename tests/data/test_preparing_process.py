"""Datasets made in a process apart: what it makes, what it says of errors, and that it ends when nobody wants it."""

from pathlib import Path
from typing import Any

import pytest

from smelt.data.datasets import open_dataset
from smelt.data.preparing_process import Order, prepare_apart
from smelt.errors import AlreadyExists, DataError, NotEnoughData, SmeltError

TEXT = "A line of text that is long enough to be of use.\n" * 40


def order(tmp_path: Path, file: Path | None = None, **changes: Any) -> Order:
    values: dict[str, Any] = {
        "datasets_folder": str(tmp_path / "datasets"),
        "name": "new",
        "source": "lines.txt",
        "file": None if file is None else str(file),
        "tokenizer": "bytes",
        "val_fraction": 0.1,
        "block_size": 16,
        "column": "text",
        "errors": "strict",
        "owner": "ada",
        "job": "job-1",
    }
    return Order(**values | changes)


def silent(_stage: str, _num_done: int, _num_total: int | None) -> None:
    """Nobody looks."""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "content.txt"
    path.write_text(TEXT)
    return path


def test_a_dataset_knows_whose_it_is_and_names_no_path(tmp_path: Path, file: Path) -> None:
    stages: list[str] = []
    prepare_apart(order(tmp_path, file), lambda stage, *_: stages.append(stage))
    manifest = open_dataset(tmp_path / "datasets" / "new").manifest
    assert (manifest.owner, manifest.job, manifest.source) == ("ada", "job-1", "lines.txt")
    with pytest.raises(AlreadyExists):
        prepare_apart(order(tmp_path, file), silent)


def test_an_error_comes_back_as_what_it_was(tmp_path: Path, file: Path) -> None:
    file.write_text("short")
    with pytest.raises(NotEnoughData, match=r"lines\.txt gives 6 tokens"):
        prepare_apart(order(tmp_path, file), silent)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"lines\.txt is UTF-16") as refusal:
        prepare_apart(order(tmp_path, file), silent)
    assert str(tmp_path) not in str(refusal.value)
    with pytest.raises(DataError, match="inner network"):
        prepare_apart(order(tmp_path, source="http://127.0.0.1:1/x.txt"), silent)


class WantedNoMoreError(SmeltError):
    """In place of a cancellation."""


def test_one_that_nobody_wants_leaves_nothing(tmp_path: Path, file: Path) -> None:
    def stop(*_: object) -> None:
        raise WantedNoMoreError

    with pytest.raises(WantedNoMoreError):
        prepare_apart(order(tmp_path, source="builtin:pydoc", tokenizer="bpe:4096"), stop)
    prepare_apart(order(tmp_path, file, name="other"), silent)  # which removes what a killed one has left
    assert {path.name for path in (tmp_path / "datasets").glob("*")} == {".lock", "other"}
