"""What can be done with registered models: list, show, import, export, remove; knows no torch and no terminal.

A model appears under its name whole or not at all: it is put together in a folder with a temporary name, synced
to the disk, and renamed. Only weights, config and tokenizer are kept: no code, no pickles.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from smelt.configs import DecoderConfig
from smelt.disk import is_full, sync
from smelt.errors import AlreadyExists, NotFound, OutOfSpace, SmeltError, UnsafeFile
from smelt.models.architectures import CONFIG_FILE
from smelt.models.folders import (
    INDEX_FILE,
    check_weights,
    read_config,
    read_hf_config,
    read_json,
    read_tokenizer,
    weight_files,
)
from smelt.models.registry import TOKENIZER_FILES, check_name, is_registered, registered_names, resolve

ORIGIN_FILE = "origin.json"
TEMPORARY = ".tmp-"


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What is known of a model without loading it. `problem` says why it cannot be used, if so."""

    name: str
    folder: Path
    num_bytes: int
    config: DecoderConfig | None = None
    tokenizer: str | None = None
    origin: str | None = None  # what it was imported from
    problem: str | None = None


def list_models(models_folder: Path) -> list[ModelInfo]:
    """Every registered model by name; damaged ones too, with what is wrong."""
    return [_describe(name, models_folder / name) for name in registered_names(models_folder)]


def show_model(name_or_folder: str, models_folder: Path) -> ModelInfo:
    """One model, by anything `resolve` understands. NotFound where there is none."""
    path = resolve(name_or_folder, models_folder)
    if path.is_file():
        raise UnsafeFile(f"{path} is a nanoGPT checkpoint; see its shape with: smelt models import {path} NAME")
    return _describe(name_or_folder, path)


def _describe(name: str, folder: Path) -> ModelInfo:
    num_bytes = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    origin = None
    try:
        if (folder / ORIGIN_FILE).is_file():
            origin = read_json(folder / ORIGIN_FILE)["source"]
        config = read_config(folder)
        check_weights(folder, config)
        tokenizer = read_tokenizer(folder)
    except (SmeltError, LookupError, TypeError) as error:
        return ModelInfo(name, folder, num_bytes, origin=origin, problem=str(error))
    return ModelInfo(name, folder, num_bytes, config, tokenizer.name if tokenizer else None, origin)


def import_model(source: Path, name: str, models_folder: Path, origin: str) -> Path:
    """Register the model of a folder under a name. Raises AlreadyExists, UnsupportedModel, UnsafeFile, OutOfSpace."""
    check_weights(source, read_config(source))
    with new_model(name, models_folder, origin) as folder:
        copy_model(source, folder)
    return models_folder / name


@contextmanager
def new_model(name: str, models_folder: Path, origin: str) -> Iterator[Path]:
    """A folder to fill, which becomes the model of that name if all goes well, and else vanishes."""
    check_name(name)
    models_folder.mkdir(parents=True, exist_ok=True)
    with _lock(models_folder):
        for leftover in models_folder.glob(f"{TEMPORARY}*"):  # of a process that was killed
            shutil.rmtree(leftover)
        if (models_folder / name).exists():
            raise AlreadyExists(f"a model {name!r} exists; choose another name, or remove it: smelt models rm {name}")
        with _appearing(models_folder / name) as folder:
            yield folder
            value = {"source": origin, "imported": datetime.now(UTC).isoformat(timespec="seconds")}
            (folder / ORIGIN_FILE).write_text(json.dumps(value, indent=1), encoding="utf-8")


def export_model(source: Path, folder: Path) -> None:
    """Write a model's folder as a plain Hugging Face folder. AlreadyExists where something is in the way."""
    check_weights(source, read_config(source))
    with new_export(folder) as target:
        copy_model(source, target)


@contextmanager
def new_export(folder: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `folder` if all goes well. AlreadyExists where it holds something."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise AlreadyExists(f"{folder} exists and is not empty; choose another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _appearing(folder) as temporary:
        yield temporary


def remove_model(name: str, models_folder: Path) -> None:
    """Delete a registered model. NotFound where there is none; folders elsewhere are never touched."""
    if not is_registered(name, models_folder):
        known = ", ".join(registered_names(models_folder)) or "none"
        raise NotFound(f"no registered model {name!r}; registered: {known}")
    with _lock(models_folder):
        doomed = models_folder / f"{TEMPORARY}{name}"
        (models_folder / name).rename(doomed)  # gone at once, even if deleting is interrupted
        shutil.rmtree(doomed)


def copy_model(source: Path, folder: Path) -> None:
    """Copy weights, config and tokenizer, without references to code."""
    hf = read_hf_config(source)
    hf.pop("auto_map", None)
    (folder / CONFIG_FILE).write_text(json.dumps(hf, indent=2), encoding="utf-8")
    weights = weight_files(source)
    index = [source / INDEX_FILE] if (source / INDEX_FILE).is_file() and len(weights) > 1 else []
    for path in (*weights, *index, *(source / name for name in TOKENIZER_FILES)):
        if path.is_file():
            shutil.copyfile(path, folder / path.name)
    _drop_code_reference(folder / "tokenizer_config.json")


def _drop_code_reference(path: Path) -> None:
    if not path.is_file():
        return
    value = read_json(path)
    if isinstance(value, dict) and value.pop("auto_map", None) is not None:
        path.write_text(json.dumps(value, indent=2), encoding="utf-8")


@contextmanager
def _appearing(folder: Path) -> Iterator[Path]:
    """A temporary sibling that is synced and renamed to `folder` at the end, or removed on any error."""
    temporary = folder.with_name(f"{TEMPORARY}{folder.name}-{os.getpid()}")
    temporary.mkdir()
    try:
        yield temporary
        for path in (*temporary.iterdir(), temporary):
            sync(path)
        temporary.rename(folder)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError) and is_full(error):
            raise OutOfSpace(f"no space left for {folder}; free some and try again") from error
        raise
    sync(folder.parent)


@contextmanager
def _lock(models_folder: Path) -> Iterator[None]:
    """One change at a time, across processes."""
    with (models_folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
