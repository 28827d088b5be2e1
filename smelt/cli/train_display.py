"""A run as people watch it: a live bar on a terminal, plain lines elsewhere; knows events, not training."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from smelt.cli.console import progress_console
from smelt.configs import TrainConfig
from smelt.training.metrics import EvalMetrics, Event, RunInfo, Sink, StepMetrics, describe
from smelt.training.sinks import line_sink

SMOOTHING = 0.9  # weight of the past in the figures beside the bar


@contextmanager
def training_display(config: TrainConfig) -> Iterator[Sink]:
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
        self.tokens_per_second = 0.0
        self.mfu = 0.0

    def __call__(self, event: Event) -> None:
        """Show one event."""
        if isinstance(event, StepMetrics):
            self._show_step(event)
            return
        self.progress.console.print(describe(event), highlight=False)
        if isinstance(event, RunInfo):
            total = event.config.max_iters
            self.task = self.progress.add_task("", total=total, completed=event.first_step, figures="")
        elif isinstance(event, EvalMetrics):
            self.val_loss = event.val_loss

    def _show_step(self, metrics: StepMetrics) -> None:
        assert self.task is not None, "RunInfo comes first"
        first = self.loss is None
        keep = 0.0 if first else SMOOTHING
        self.loss = metrics.loss if self.loss is None else keep * self.loss + (1 - keep) * metrics.loss
        self.tokens_per_second = keep * self.tokens_per_second + (1 - keep) * metrics.tokens_per_second
        self.mfu = keep * self.mfu + (1 - keep) * metrics.mfu
        val = "" if self.val_loss is None else f"val {self.val_loss:.3f}  "
        figures = f"loss {self.loss:.3f}  {val}{self.tokens_per_second:,.0f} tok/s  mfu {self.mfu:.0%}"
        self.progress.update(self.task, completed=metrics.step, figures=figures)
