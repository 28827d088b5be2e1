"""Runs as everybody sees them: state, curves, config, log; knows their folders, no process, no HTTP and no torch.

A run's folder is the truth: the lock says whether it is trained now, `metrics.jsonl` how far it is and how it ended.
"""

import shlex
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from smelt.configs import RUN_LOG, RUN_METRICS, flag_text
from smelt.control.run_folders import Entry, find_run, find_runs, is_training, no_such_run
from smelt.control.run_metrics import Curves, Glance, Glances, LineFile, read_curves, text_of
from smelt.models.registry import RUN_LINKS
from smelt.run_configs import RECIPE_CONFIGS, RECIPE_SECTIONS

State = Literal["queued", "running", "succeeded", "failed", "cancelled"]
LOST = "its process ended without a word, as after kill -9 or a power loss; it can be resumed"
STOPPED = "it was stopped before its end; it can be resumed"
ENDED = ("succeeded", "failed", "cancelled")
MAX_LOG_LINES = 2000
VERBS = {"pretrain": "train", "fine-tune": "finetune", "classify": "train-classifier"}  # the command of each recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStatus:
    """A run in a list. Fields are None while nothing is known of them."""

    id: str
    owner: str
    name: str
    recipe: str
    state: State
    reason: str  # why it failed or has stopped, or what it waits for; else empty
    out_dir: str
    created: float  # seconds since 1970, as are the others
    started: float | None
    step: int
    max_iters: int
    loss: float | None
    val_loss: float | None
    best_val_loss: float | None
    tokens_per_second: float | None
    seconds_left: float | None
    spark: list[float] = field(default_factory=list)  # the loss in a few dozen points


@dataclass(frozen=True, slots=True, kw_only=True)
class RunDetails(RunStatus):
    """A run on a page of its own."""

    config: dict[str, Any]
    config_yaml: str  # without the folder: who trains by it again needs another
    command_line: str  # runs the same again, into a folder of its own


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A state of a run that it, or another one, can go on from. A model's folder, unless it is an adapter's."""

    step: int
    name: str  # of its folder
    path: str
    created: float  # seconds since 1970
    num_bytes: int
    is_best: bool
    is_last: bool


@dataclass(frozen=True, slots=True)
class Log:
    """The last lines of a run's log. `cursor`: where they end in the file."""

    lines: list[str]
    cursor: str
    written: float | None = None  # seconds since 1970; None: nothing was


class Runs:
    """The runs of one home folder. The methods block shortly, and may be called from any thread."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._glances: dict[Path, Glances] = {}
        self._lock = threading.Lock()  # a glance is brought up to date by one thread at a time

    def all(self, owner: str | None = None) -> list[RunStatus]:
        """Every run of an owner, or of all, newest first."""
        found = find_runs(self.folder)
        return [self._status(entry, out_dir) for entry, out_dir in found if owner in (None, entry.owner)]

    def find(self, run_id: str, owner: str | None = None) -> tuple[Entry, Path]:
        """A run's entry and folder. NotFound where the owner has none of that id."""
        entry, out_dir = find_run(run_id, self.folder)
        if owner not in (None, entry.owner):
            raise no_such_run(run_id)
        return entry, out_dir

    def status(self, run_id: str, owner: str | None = None) -> RunStatus:
        """How one run stands. NotFound where the owner has none of that id."""
        return self._status(*self.find(run_id, owner))

    def show(self, run_id: str, owner: str | None = None) -> RunDetails:
        """One run with its config. NotFound where the owner has none of that id."""
        entry, out_dir = self.find(run_id, owner)
        given = {name: value for name, value in entry.config.items() if value is not None and name != "out_dir"}
        return RunDetails(
            **asdict(self._status(entry, out_dir)),
            config=entry.config,
            config_yaml=yaml.safe_dump(given, sort_keys=False),
            command_line=command_line(entry.config),
        )

    def curves(self, run_id: str, owner: str | None = None) -> Curves:
        """A run's curves. NotFound where the owner has none of that id."""
        return read_curves(self.find(run_id, owner)[1] / RUN_METRICS)

    def checkpoints(self, run_id: str, owner: str | None = None) -> list[Checkpoint]:
        """What is kept of a run, newest first. NotFound where the owner has none of that id."""
        return checkpoints_in(self.find(run_id, owner)[1])

    def log(self, run_id: str, num_lines: int, owner: str | None = None) -> Log:
        """The end of a run's log. NotFound where the owner has none of that id."""
        file = LineFile(self.find(run_id, owner)[1] / RUN_LOG)
        lines = file.read() or []
        return Log(text_of(lines[-num_lines:]), file.cursor, file.path.stat().st_mtime if lines else None)

    def _status(self, entry: Entry, out_dir: Path) -> RunStatus:
        # The lock first: a run that ends in between then has its last line in the file.
        is_held = is_training(out_dir)
        with self._lock:
            glance = self._glances.setdefault(out_dir, Glances(out_dir / RUN_METRICS)).update()
        state, reason = state_of(entry, glance, is_held)
        return RunStatus(
            id=entry.id,
            owner=entry.owner,
            name=entry.label or out_dir.name,
            recipe=entry.recipe,
            state=state,
            reason=reason,
            out_dir=str(out_dir),
            created=entry.created,
            started=entry.started,
            step=glance.step,
            max_iters=num_steps(entry, glance),
            loss=glance.loss,
            val_loss=glance.val_loss,
            best_val_loss=glance.best_val_loss,
            tokens_per_second=glance.tokens_per_second,
            seconds_left=seconds_left(entry, glance) if state == "running" else None,
            spark=list(glance.spark),
        )


def state_of(entry: Entry, glance: Glance, is_held: bool) -> tuple[State, str]:
    """The state and, where something is wrong, the reason."""
    if is_held:
        return "running", ""
    if glance.ending is not None:
        if glance.ending.kind == "failure":
            return "failed", glance.ending.message
        if glance.ending.kind == "cancelled":
            return "cancelled", ""
        return ("cancelled", STOPPED) if glance.ending.stop_reason == "interrupted" else ("succeeded", "")
    if glance.waits_for:
        return "queued", glance.waits_for
    return ("queued", "") if entry.started is None else ("failed", LOST)


def checkpoints_in(out_dir: Path) -> list[Checkpoint]:
    """The checkpoints of a run's folder, newest first; one that is removed meanwhile is left out."""
    best, last = ((out_dir / link).resolve().name for link in RUN_LINKS)
    found = []
    for folder in sorted((out_dir / "checkpoints").glob("step-*"), reverse=True):
        with suppress(FileNotFoundError):
            sizes = [path.stat().st_size for path in folder.iterdir()]
            step, created = int(folder.name.removeprefix("step-")), folder.stat().st_mtime
            found.append(
                Checkpoint(
                    step, folder.name, str(folder), created, sum(sizes), folder.name == best, folder.name == last
                )
            )
    return found


def num_steps(entry: Entry, glance: Glance) -> int:
    """The step at which the run will be done; 0 while only its data could tell."""
    return glance.num_steps or entry.config.get("max_iters") or 0


def seconds_left(entry: Entry, glance: Glance) -> float | None:
    """By the pace of the last steps; None while there is none. Evaluations come on top."""
    if glance.step_seconds is None:
        return None
    left = max(0, num_steps(entry, glance) - glance.step) * glance.step_seconds
    if entry.config.get("max_time") and entry.started:
        left = min(left, max(0.0, entry.started + entry.config["max_time"] - time.time()))
    return left


def command_line(config: dict[str, Any]) -> str:
    """The command that trains the same: every value that is not the default, into a fresh folder."""
    recipe = config.get("recipe", "pretrain")
    words = ["smelt", VERBS[recipe]]
    fields = RECIPE_CONFIGS[recipe].model_fields
    for name in (name for section in RECIPE_SECTIONS[recipe].values() for name in section):
        default = fields[name].default
        value = config.get(name, default)
        text = flag_text(value)
        if name == "out_dir" and value is not None:
            text = f"{value}-again"
        if value is not None and text != flag_text(default):
            words += [f"--{name.replace('_', '-')}", text]
    return shlex.join(words)
