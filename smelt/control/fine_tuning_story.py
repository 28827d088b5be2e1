"""What a fine-tuning job tells: events, checkpoints with their figures, a table of steps; all of it out of its run.

Knows no HTTP and no torch. A run that is resumed tells each step once.
"""

import csv
import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import msgspec

from smelt.control.run_metrics import LineFile
from smelt.storage.records import FineTuningJob

Level = Literal["info", "warn", "error"]
COLUMNS = (
    "step",
    "train_loss",
    "train_mean_token_accuracy",
    "valid_loss",
    "valid_mean_token_accuracy",
    "full_valid_loss",
    "full_valid_mean_token_accuracy",
)

OPENAI_NAMES = {"accuracy": "mean_token_accuracy"}


class Figures(msgspec.Struct):
    """A step, and what was measured there."""

    step: int
    created: float  # seconds since 1970
    values: dict[str, float | None] = {}


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened. `data` are the figures of a step."""

    created: float
    message: str
    level: Level = "info"
    data: dict[str, Any] | None = None


class _Line(msgspec.Struct):
    kind: str
    step: int = 0
    num_steps: int | None = None
    loss: float | None = None
    val_loss: float | None = None
    final: bool = False
    tokens_per_second: float | None = None
    seconds: float | None = None
    text: str = ""
    figures: dict[str, float | None] = {}


@dataclass(slots=True)
class Story:
    """A run's metrics, step by step. `num_tokens`: that were learned from."""

    steps: dict[int, Figures] = field(default_factory=dict)
    notes: list[tuple[float, str]] = field(default_factory=list)
    num_steps: int = 0
    num_tokens: float = 0.0


def read_story(metrics: Path, started: float) -> Story:
    """What the lines of a run tell. Steps have no time of their own: it follows from how long each took."""
    story, now = Story(), started
    for line in _lines(metrics):
        if line.kind == "start":
            story.num_steps = line.num_steps or 0
        elif line.kind == "step":
            now += line.seconds or 0.0
            story.num_tokens += (line.tokens_per_second or 0.0) * (line.seconds or 0.0)
            _note(story, line, now, {"train_loss": line.loss}, "train")
        elif line.kind == "evaluation":
            place = "full_valid" if line.final else "valid"
            _note(story, line, now, {f"{place}_loss": line.val_loss}, place)
        elif line.kind == "note":
            story.notes.append((now, line.text))
    return story


def _lines(metrics: Path) -> Iterator[_Line]:
    for raw in LineFile(metrics).read() or []:
        try:
            yield msgspec.json.decode(raw, type=_Line)
        except msgspec.DecodeError:
            continue  # of a trainer that writes otherwise


def _note(story: Story, line: _Line, now: float, values: dict[str, float | None], place: str) -> None:
    figures = story.steps.setdefault(line.step, Figures(line.step, now, {}))
    figures.values |= values
    for name, value in line.figures.items():
        figures.values[f"{place}_{OPENAI_NAMES.get(name, name)}"] = value


def events_of(job: FineTuningJob, story: Story, started: float | None) -> list[Event]:
    """All that has happened, in order. More of it comes behind, so an event keeps its place."""
    events = [Event(job.created, f"Created fine-tuning job: {job.id}")]
    events.append(Event(job.created, f"Validating training file: {job.request['training_file']}"))
    if job.run_id is not None:
        events.append(Event(job.created, "Files validated, moving job to queued state"))
    if started is not None:
        events.append(Event(started, "Fine-tuning job started"))
    told = [Event(created, text, "warn") for created, text in story.notes]
    told += [_step_event(figures, story.num_steps) for figures in story.steps.values()]
    events += sorted(told, key=lambda event: event.created)
    return [*events, *_ending(job)]


def _step_event(figures: Figures, num_steps: int) -> Event:
    names = {"train_loss": "training loss", "valid_loss": "validation loss", "full_valid_loss": "full validation loss"}
    told = [
        f"{names[name]}={value:.2f}" for name, value in figures.values.items() if name in names and value is not None
    ]
    data = {"step": figures.step, "total_steps": num_steps, **figures.values}
    return Event(figures.created, f"Step {figures.step}/{num_steps}: {', '.join(told)}", data=data)


def _ending(job: FineTuningJob) -> Iterable[Event]:
    ended = job.finished or job.created
    if job.state == "succeeded":
        yield Event(ended, f"New fine-tuned model created: {job.fine_tuned_model}")
        yield Event(ended, "The job has successfully completed")
    elif job.state == "failed":
        yield Event(ended, f"The job failed: {(job.error or {}).get('message', '')}", "error")
    elif job.state == "cancelled":
        yield Event(ended, "The job was cancelled")


def table_of(story: Story) -> bytes:
    """The steps as CSV; what was not measured at a step is left empty."""
    extra = sorted({name for figures in story.steps.values() for name in figures.values} - set(COLUMNS))
    text = io.StringIO()
    rows = csv.DictWriter(text, [*COLUMNS, *extra], restval="", lineterminator="\n")
    rows.writeheader()
    rows.writerows({"step": figures.step, **figures.values} for figures in story.steps.values())
    return text.getvalue().encode()
