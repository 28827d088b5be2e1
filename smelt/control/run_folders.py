"""Run folders: which there are, whose they are, whether somebody trains in one now; knows no metrics and no torch.

A run lives where its `--out-dir` says. Its folder holds `run.json`, and the home folder a small file per run that
says where to look, so that runs started in a terminal are found by a server. A run that is resumed keeps its id; a
folder that is gone, or holds another run by now, is no longer listed.
"""

import fcntl
import os
import re
import shlex
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import msgspec

from smelt.configs import RUN_LOCK
from smelt.errors import NotFound
from smelt.run_configs import RunConfig
from smelt.types import LOCAL_OWNER

ENTRY_FILE = "run.json"
REGISTRY = ".registry"
NAMED = ("tokenizer", "init_from", "model")  # fields that mean something by its name, unless there is a slash in it
ID = re.compile(r"run-[0-9a-f]{12}")


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a run apart from its metrics."""

    id: str
    owner: str
    recipe: str
    config: dict[str, Any]  # of its recipe's class; what it began with, even after a resume
    created: float  # seconds since 1970
    started: float | None = None  # of the last start; None: asked of a server, and not begun
    pid: int | None = None  # of the last start; tells people where to look, proves nothing
    command: str | None = None
    label: str | None = None  # what its sender calls it; else the name of its folder
    future_id: str | None = None  # of the last request in a server's ledger
    num_requests: int = 0  # so often it was asked for there; each but the first resumes it


class Place(msgspec.Struct, frozen=True):
    """What the home folder keeps of a run."""

    out_dir: str


def new_run_id() -> str:
    """An id for a run."""
    return f"run-{uuid.uuid4().hex[:12]}"


def register(config: RunConfig, runs_folder: Path) -> Entry:
    """Note that this process now trains in the config's out_dir, which it has locked."""
    assert config.out_dir is not None, "the recipe has chosen one"
    out_dir = Path(config.out_dir).absolute()
    known = read_entry(out_dir)
    keeps_id = known is not None and (config.init_from == "resume" or known.future_id is not None)
    before = known if known is not None and keeps_id else None
    entry = Entry(
        id=before.id if before else new_run_id(),
        owner=before.owner if before else LOCAL_OWNER,
        recipe=config.recipe,
        config=_lasting_values(config, before),
        created=before.created if before else time.time(),
        started=time.time(),
        pid=os.getpid(),
        command=shlex.join(sys.argv),
        label=before.label if before else None,
        future_id=before.future_id if before else None,
        num_requests=before.num_requests if before else 0,
    )
    write_entry(entry, out_dir, runs_folder)
    _forget_others(entry, out_dir, runs_folder)
    return entry


def _forget_others(entry: Entry, out_dir: Path, runs_folder: Path) -> None:
    """Remove from the home folder the runs that were in this folder before."""
    for path in (runs_folder / REGISTRY).glob("run-*.json"):
        place = _read_place(path)
        if place is not None and place.out_dir == str(out_dir) and path.stem != entry.id:
            path.unlink(missing_ok=True)


def _lasting_values(config: RunConfig, before: Entry | None) -> dict[str, Any]:
    """The config's values in words that mean the same tomorrow, from any folder."""
    values = config.model_dump(mode="json")
    if config.init_from == "resume" and before is not None:
        values["init_from"] = before.config.get("init_from", "resume")
    for name in config.path_fields:
        value = values[name]
        is_path = value is not None and (name not in NAMED or "/" in value)
        if is_path and Path(value).expanduser().exists():
            values[name] = str(Path(value).expanduser().absolute())
    return {**values, "out_dir": str(Path(values["out_dir"]).absolute())}


def write_entry(entry: Entry, out_dir: Path, runs_folder: Path) -> None:
    """Write a run's entry to its folder, and its place to the home folder."""
    (runs_folder / REGISTRY).mkdir(parents=True, exist_ok=True)
    out_dir.mkdir(parents=True, exist_ok=True)
    _replace(out_dir / ENTRY_FILE, msgspec.json.encode(entry))
    _replace(runs_folder / REGISTRY / f"{entry.id}.json", msgspec.json.encode(Place(str(out_dir))))


def _replace(path: Path, body: bytes) -> None:
    """A reader finds the old file or the new one, never half of one."""
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    temporary.write_bytes(body)
    temporary.rename(path)


def read_entry(out_dir: Path) -> Entry | None:
    """The run that a folder holds; None where it holds none, or a file that is not ours."""
    try:
        return msgspec.json.decode((out_dir / ENTRY_FILE).read_bytes(), type=Entry)
    except (OSError, msgspec.DecodeError):
        return None


def find_runs(runs_folder: Path) -> list[tuple[Entry, Path]]:
    """Every run whose folder is still there, with that folder, newest first."""
    found = [_find(path.stem, runs_folder) for path in (runs_folder / REGISTRY).glob("run-*.json")]
    return sorted((run for run in found if run is not None), key=lambda run: -run[0].created)


def find_run(run_id: str, runs_folder: Path) -> tuple[Entry, Path]:
    """A run and its folder. NotFound where there is none of that id, or its folder is gone."""
    found = _find(run_id, runs_folder) if ID.fullmatch(run_id) else None
    if found is None:
        raise no_such_run(run_id)
    return found


def no_such_run(run_id: str) -> NotFound:
    """What to say for an unknown id, and for one that is not the asker's."""
    return NotFound(f"there is no run {run_id!r}")


def _find(run_id: str, runs_folder: Path) -> tuple[Entry, Path] | None:
    place = _read_place(runs_folder / REGISTRY / f"{run_id}.json")
    if place is None:
        return None
    entry = read_entry(Path(place.out_dir))
    return (entry, Path(place.out_dir)) if entry is not None and entry.id == run_id else None


def _read_place(path: Path) -> Place | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=Place)
    except (OSError, msgspec.DecodeError):
        return None


def is_training(out_dir: Path) -> bool:
    """Whether a process holds the folder now.

    To ask takes the lock for a moment, shared with others who ask; a trainer that starts just then tries again.
    """
    try:
        descriptor = os.open(out_dir / RUN_LOCK, os.O_RDONLY)
    except OSError:  # never trained in, or gone
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False
