"""Where a run's events go: a file for machines, plain lines, optional services; knows no model and no loop."""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from smelt.errors import MissingDependency
from smelt.run_configs import RunConfig
from smelt.training.metrics import EvalMetrics, Event, RunInfo, RunSummary, Sink, StepMetrics, describe

KINDS = {"StepMetrics": "step", "EvalMetrics": "evaluation", "Note": "note", "RunSummary": "summary"}


def is_logged(event: Event, log_interval: int) -> bool:
    """Every event but the steps between two log intervals."""
    return not isinstance(event, StepMetrics) or event.step % log_interval == 0 or event.step == 1


def jsonl_sink(path: Path, log_interval: int) -> Sink:
    """An object per logged event in `path`; a resumed run goes on where its checkpoint stood, each step once."""

    def receive(event: Event) -> None:
        if isinstance(event, RunInfo):
            start = {"kind": "start", "step": event.first_step, "num_steps": event.num_steps}
            lines = [*lines_until(path, event.first_step), json.dumps(start) + "\n"]
            path.write_text("".join(lines), encoding="utf-8")
        elif is_logged(event, log_interval):
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"kind": KINDS[type(event).__name__], **finite_values(event)}) + "\n")

    return receive


@contextmanager
def endings_noted(path: Path) -> Iterator[None]:
    """Write to `path` how the block ended if it raised: a run that says nothing at its end counts as lost."""
    try:
        yield
    except KeyboardInterrupt:
        _note_ending(path, {"kind": "cancelled"})
        raise
    except Exception as error:
        _note_ending(path, {"kind": "failure", "error": type(error).__name__, "message": str(error)})
        raise


def _note_ending(path: Path, values: dict[str, Any]) -> None:
    # What went wrong first, a full disk perhaps, is what the user must hear of.
    with suppress(OSError), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(values) + "\n")


def finite_values(event: Event) -> dict[str, Any]:
    """The event's fields, with null where JSON has no number (NaN and infinity)."""
    return _finite(asdict(event))


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    return {
        k: _finite(v) if isinstance(v, dict) else None if isinstance(v, float) and not math.isfinite(v) else v
        for k, v in values.items()
    }


def lines_until(path: Path, last_step: int) -> list[str]:
    """The steps and evaluations of the run's earlier part, up to the checkpoint that it resumes from.

    A kill may have cut the last line; it and everything after the checkpoint will be written again.
    """
    if last_step == 0 or not path.is_file():
        return []
    whole_lines = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
    return [line for line in whole_lines if _is_before(json.loads(line), last_step)]


def _is_before(values: dict[str, Any], last_step: int) -> bool:
    in_progress = values["kind"] in ("step", "evaluation") and not values.get("final")
    return in_progress and bool(values["step"] <= last_step)


def log_sink(path: Path, log_interval: int) -> Sink:
    """The lines of a run and when they were written, after whatever is in the log already."""

    def receive(event: Event) -> None:
        if not is_logged(event, log_interval):
            return
        with path.open("a", encoding="utf-8") as file:
            file.write(f"{datetime.now(UTC).astimezone():%Y-%m-%d %H:%M:%S}  {describe(event)}\n")

    return receive


def line_sink(write: Callable[[str], object], log_interval: int) -> Sink:
    """Lines of text for a pipe, a log file or a notebook."""

    def receive(event: Event) -> None:
        if is_logged(event, log_interval):
            write(describe(event) + "\n")

    return receive


def wandb_sink(config: RunConfig, out_dir: Path) -> Sink:
    """Weights & Biases, which reads its WANDB_* variables itself. MissingDependency without the package."""
    try:
        import wandb  # noqa: PLC0415 an optional dependency
    except ImportError:
        raise MissingDependency("--wandb needs the wandb package: pip install 'smelt[wandb]'") from None
    run = wandb.init(project="smelt", name=out_dir.name, dir=str(out_dir), config=config.model_dump(mode="json"))
    return scalar_sink(lambda values, step: run.log(values, step=step), run.finish, config.log_interval)


def tensorboard_sink(config: RunConfig, out_dir: Path) -> Sink:
    """Event files in out_dir/tensorboard. MissingDependency without the package."""
    try:
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 an optional dependency
    except ImportError:
        raise MissingDependency("--tensorboard needs the package: pip install 'smelt[tensorboard]'") from None
    writer = SummaryWriter(str(out_dir / "tensorboard"))

    def send(values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    return scalar_sink(send, writer.close, config.log_interval)


def scalar_sink(
    send: Callable[[dict[str, float], int], object], close: Callable[[], object], log_interval: int
) -> Sink:
    """Numbers by name and step, for a service that draws curves."""

    def receive(event: Event) -> None:
        if isinstance(event, StepMetrics) and is_logged(event, log_interval):
            values = {k: v for k, v in asdict(event).items() if k not in ("step", "figures") and v is not None}
            send({f"train/{k}": v for k, v in (values | event.figures).items()}, event.step)
        elif isinstance(event, EvalMetrics):
            send({"val/loss": event.val_loss} | {f"val/{k}": v for k, v in event.figures.items()}, event.step)
        elif isinstance(event, RunSummary):
            close()

    return receive
