"""A run as people watch it: a live bar on a terminal, plain lines elsewhere; knows events, not training."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from smelt.cli.console import progress_console
from smelt.run_configs import RunConfig
from smelt.training.metrics import EvalMetrics, Event, RunInfo, Sink, StepMetrics, describe
from smelt.training.sinks import line_sink

SMOOTHING = 0.9  # weight of the past in the figures beside the bar


@contextmanager
def training_display(config: RunConfig) -> Iterator[Sink]:
    """A sink that shows the run on stderr while the block lasts."""
    console = progress_console()
    if not console.is_terminal:
        yield line_sink(sys.stderr.write, config.log_interval)
        return
    progress = Progress(
        TextColumn("step {task.completed:,.0f}/{task.total:,.0f}"),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[figures]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(elapsed_when_finished=False),
        console=console,
        speed_estimate_period=60,
    )
    with progress:
        yield TrainingBar(progress)


class TrainingBar:
    """A sink: one bar with loss, validation loss, speed and the time left; other events as lines above it."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.task: TaskID | None = None
        self.loss: float | None = None
        self.val_loss: float | None = None
        self.pace = 0.0  # samples or tokens per second
        self.mfu: float | None = None

    def __call__(self, event: Event) -> None:
        """Show one event."""
        if isinstance(event, StepMetrics):
            self._show_step(event)
            return
        self.progress.console.print(describe(event), highlight=False)
        if isinstance(event, RunInfo):
            total = event.num_steps
            self.task = self.progress.add_task("", total=total, completed=event.first_step, figures="")
        elif isinstance(event, EvalMetrics):
            self.val_loss = event.val_loss

    def _show_step(self, metrics: StepMetrics) -> None:
        assert self.task is not None, "RunInfo comes first"
        first = self.loss is None
        keep = 0.0 if first else SMOOTHING
        self.loss = metrics.loss if self.loss is None else keep * self.loss + (1 - keep) * metrics.loss
        pace, unit = metrics.samples_per_second, "samples/s"
        if pace is None:
            pace, unit = metrics.tokens_per_second, "tok/s"
        self.pace = keep * self.pace + (1 - keep) * pace
        if metrics.mfu is not None:
            self.mfu = metrics.mfu if self.mfu is None else keep * self.mfu + (1 - keep) * metrics.mfu
        val = "" if self.val_loss is None else f"val {self.val_loss:.3f}  "
        mfu = "" if self.mfu is None else f"  mfu {self.mfu:.0%}"
        figures = f"loss {self.loss:.3f}  {val}{self.pace:,.0f} {unit}{mfu}"
        self.progress.update(self.task, completed=metrics.step, figures=figures)
