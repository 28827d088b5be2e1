"""What can be done with registered models: list, show, import, export, name, remove; knows no torch and no terminal.

A model appears under its name whole or not at all: it is put together in a folder with a temporary name, synced
to the disk, and renamed.
"""

import fcntl
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from smelt.configs import DecoderConfig
from smelt.control.model_files import TEMPORARY, copy_model, sync_all, temporary_for, vanishing
from smelt.disk import sync
from smelt.errors import AlreadyExists, InvalidInput, NotFound, SmeltError, UnsafeFile, UnsupportedModel
from smelt.models.aliases import DEFAULT, DEFAULT_NAMES, read_aliases, write_aliases
from smelt.models.encoder_architectures import ClassifierShape
from smelt.models.folders import base_of, check_model, classifier_in, is_adapter, read_config, read_json, read_tokenizer
from smelt.models.registry import (
    check_name,
    is_registered,
    name_at,
    owner_of,
    registered_name,
    registered_names,
    resolve,
)

if TYPE_CHECKING:
    from smelt.data.sources import Progress

ORIGIN_FILE = "origin.json"


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What is known of a model without loading it. `problem` says why it cannot be used, if so."""

    name: str
    folder: Path
    num_bytes: int
    config: DecoderConfig | None = None
    classifier: ClassifierShape | None = None  # instead, of a model that says labels
    tokenizer: str | None = None
    origin: str | None = None  # what it was imported from
    problem: str | None = None
    aliases: tuple[str, ...] = ()


def list_models(models_folder: Path) -> list[ModelInfo]:
    """Every registered model by name; damaged ones too, with what is wrong."""
    aliases = read_aliases(models_folder)
    return [_describe(name, models_folder / name, aliases) for name in registered_names(models_folder)]


def show_model(name_or_folder: str, models_folder: Path) -> ModelInfo:
    """One model, by anything `resolve` understands. NotFound where there is none."""
    path = resolve(name_or_folder, models_folder)
    if path.is_file():
        raise UnsafeFile(f"{path} is a nanoGPT checkpoint; see its shape with: smelt models import {path} NAME")
    name = name_at(path, models_folder) or name_or_folder
    return _describe(name, path, read_aliases(models_folder))


def _describe(name: str, folder: Path, aliases: dict[str, str]) -> ModelInfo:
    num_bytes = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    also = tuple(alias for alias, target in aliases.items() if target == name)
    origin = None
    try:
        if (folder / ORIGIN_FILE).is_file():
            origin = read_json(folder / ORIGIN_FILE)["source"]
        whole = base_of(folder)
        shape = classifier_in(whole)
        config = read_config(whole) if shape is None else None
        check_model(whole)
        tokenizer = read_tokenizer(whole)
    except (SmeltError, LookupError, TypeError) as error:
        return ModelInfo(name, folder, num_bytes, origin=origin, problem=str(error), aliases=also)
    called = tokenizer.name if tokenizer else None
    return ModelInfo(name, folder, num_bytes, config, shape, called, origin, aliases=also)


def import_model(
    source: Path,
    name: str,
    models_folder: Path,
    origin: str,
    progress: "Progress | None" = None,
    job: str | None = None,
) -> Path:
    """Register the model of a folder under a name. `progress` hears of the bytes that are copied.

    Raises AlreadyExists, UnsupportedModel, UnsafeFile, or OutOfSpace before anything is copied.
    """
    if is_adapter(source):  # the model that it changes is named by a path, which others must not choose
        raise UnsupportedModel(f"{source} is an adapter; import a model, or register the run that made it")
    check_model(source)
    with new_model(name, models_folder, origin, job) as folder:
        copy_model(source, folder, progress)
    return models_folder / name


@contextmanager
def new_model(name: str, models_folder: Path, origin: str, job: str | None = None) -> Iterator[Path]:
    """A folder to fill, which becomes the model of that name if all goes well, and else vanishes.

    `job` is kept with it: whoever does the same job again can see that it was done.
    """
    check_name(name)
    models_folder.mkdir(parents=True, exist_ok=True)
    with changing(models_folder):
        _clear_leftovers(models_folder)
        check_free(name, models_folder)
        temporary = temporary_for(models_folder / Path(name).name)
        held = os.open(temporary, os.O_RDONLY)
        fcntl.flock(held, fcntl.LOCK_EX)  # as long as somebody fills it
    try:
        with vanishing(temporary, models_folder / name):
            yield temporary
            value = {"source": origin, "imported": datetime.now(UTC).isoformat(timespec="seconds"), "job": job}
            (temporary / ORIGIN_FILE).write_text(json.dumps(value, indent=1), encoding="utf-8")
            sync_all(temporary)
            with changing(models_folder):
                check_free(name, models_folder)
                (models_folder / name).parent.mkdir(exist_ok=True)
                temporary.rename(models_folder / name)
    finally:
        os.close(held)
    sync((models_folder / name).parent)
    sync(models_folder)


def check_free(name: str, models_folder: Path) -> None:
    """AlreadyExists where a model or an alias has that name, InvalidInput where none can have it."""
    check_name(name)
    owner = owner_of(name)
    if owner is not None and (is_registered(owner, models_folder) or (models_folder / owner).is_file()):
        raise AlreadyExists(f"{owner!r} is taken, so nothing can be called {name!r}; choose another name")
    if is_registered(name, models_folder):
        raise AlreadyExists(f"a model {name!r} exists; choose another name, or remove it: smelt models rm {name}")
    if (models_folder / name).exists():
        raise AlreadyExists(f"{name!r} is taken: models are called {name}/...; choose another name")
    if (target := read_aliases(models_folder).get(name)) is not None:
        raise AlreadyExists(f"{name!r} is an alias of {target}; remove it first: smelt models alias --rm {name}")


def job_of(name: str, models_folder: Path) -> str | None:
    """The job that made a registered model, if one did and it is there."""
    try:
        value = read_json(models_folder / name / ORIGIN_FILE)
    except (OSError, SmeltError):
        return None
    return value.get("job") if isinstance(value, dict) else None


def _clear_leftovers(models_folder: Path) -> None:
    """Remove what processes left that were killed; what somebody fills now is locked."""
    for owner in models_folder.glob("[!.]*/"):
        _drop_empty(owner)
    for leftover in models_folder.glob(f"{TEMPORARY}*"):
        descriptor = os.open(leftover, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue
        finally:
            os.close(descriptor)
        shutil.rmtree(leftover)


def _drop_empty(owner: Path) -> None:
    """An owner of no model any more frees its name."""
    with suppress(OSError):  # it has models, or is one
        owner.rmdir()


def export_model(source: Path, folder: Path) -> None:
    """Write a model's folder as a plain Hugging Face folder. AlreadyExists where something is in the way."""
    check_model(source)
    with new_export(folder) as target:
        copy_model(source, target)


@contextmanager
def new_export(folder: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `folder` if all goes well. AlreadyExists where it holds something."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise AlreadyExists(f"{folder} exists and is not empty; choose another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_for(folder)
    with vanishing(temporary, folder):
        yield temporary
        sync_all(temporary)
        temporary.rename(folder)
    sync(folder.parent)


def remove_model(name: str, models_folder: Path, force: bool = False) -> None:
    """Delete a registered model; `force`: its aliases too, which else forbid it (InvalidInput).

    NotFound where there is none; folders elsewhere are never touched.
    """
    models_folder.mkdir(parents=True, exist_ok=True)
    with changing(models_folder):
        if not is_registered(name, models_folder):
            raise _not_registered(name, models_folder)
        aliases = read_aliases(models_folder)
        if pointing := [alias for alias, target in aliases.items() if target == name]:
            if not force:
                raise InvalidInput(
                    f"{name!r} has aliases: {', '.join(pointing)}; point them elsewhere, or remove them with it: "
                    f"smelt models rm --force {name}"
                )
            write_aliases({alias: target for alias, target in aliases.items() if target != name}, models_folder)
        doomed = models_folder / f"{TEMPORARY}{Path(name).name}-{secrets.token_hex(4)}"
        (models_folder / name).rename(doomed)  # gone at once, even if deleting is interrupted
        if (owner := owner_of(name)) is not None:
            _drop_empty(models_folder / owner)
        shutil.rmtree(doomed)


def set_alias(alias: str, target: str, models_folder: Path) -> str:
    """Let requests and commands call a registered model so too; returns its name, for the target may be an alias.

    An alias that exists is pointed anew. Raises NotFound, InvalidInput, or AlreadyExists where a model has that name.
    """
    check_name(alias)
    if alias in DEFAULT_NAMES and alias != DEFAULT:
        raise InvalidInput(f"{alias!r} always means the default model; choose that: smelt models alias {DEFAULT} NAME")
    models_folder.mkdir(parents=True, exist_ok=True)
    with changing(models_folder):
        if is_registered(alias, models_folder):
            raise AlreadyExists(f"a model is called {alias!r}; choose another alias")
        name = registered_name(target, models_folder)
        if name is None:
            raise _not_registered(target, models_folder)
        write_aliases({**read_aliases(models_folder), alias: name}, models_folder)
    return name


def remove_alias(alias: str, models_folder: Path) -> None:
    """Forget an alias; the model stays. NotFound where there is none."""
    models_folder.mkdir(parents=True, exist_ok=True)
    with changing(models_folder):
        aliases = read_aliases(models_folder)
        if alias not in aliases:
            raise NotFound(f"there is no alias {alias!r}; there are: {', '.join(aliases) or 'none'}")
        write_aliases({name: target for name, target in aliases.items() if name != alias}, models_folder)


def _not_registered(name: str, models_folder: Path) -> NotFound:
    known = ", ".join(registered_names(models_folder)) or "none"
    return NotFound(f"no registered model {name!r}; registered: {known}")


@contextmanager
def changing(models_folder: Path) -> Iterator[None]:
    """One change of what the folder holds at a time, across processes; held shortly, never while files are copied."""
    with (models_folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
