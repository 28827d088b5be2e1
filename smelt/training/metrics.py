"""What a run reports: events of plain numbers and the lines that describe them; knows no model and no loop.

A sink is any function of one event. The loop sends RunInfo once, then StepMetrics, EvalMetrics and Note as they
come, and RunSummary last (none after an error). Where events go is in `sinks`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from smelt.configs import TrainConfig


@dataclass(frozen=True, slots=True)
class RunInfo:
    """What is known before the first step."""

    config: TrainConfig
    out_dir: Path
    num_parameters: int
    num_train_tokens: int
    num_val_tokens: int
    dataset: str
    device: str
    dtype: str
    first_step: int  # steps done before, when resuming
    num_ranks: int
    compiled: bool


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """One optimizer step."""

    step: int  # steps done, this one included
    loss: float  # mean over the targets of the global batch
    learning_rate: float
    grad_norm: float
    tokens_per_second: float
    mfu: float  # model flops over the measured matmul peak
    seconds: float  # of this step


@dataclass(frozen=True, slots=True)
class EvalMetrics:
    """One evaluation."""

    step: int
    train_loss: float | None  # mean of the steps since the last evaluation
    val_loss: float
    is_best: bool
    num_tokens: int  # how many validation tokens were looked at
    final: bool  # the whole validation split, at the end of the run


@dataclass(frozen=True, slots=True)
class Note:
    """A line for a person, such as a fallback taken."""

    text: str


@dataclass(frozen=True, slots=True)
class RunSummary:
    """How a run ended."""

    out_dir: str
    step: int
    stop_reason: str  # done, interrupted, max_time or eval_only
    val_loss: float | None  # over the whole validation split; None where the run was interrupted
    best_val_loss: float | None
    num_tokens: int  # trained on by this process's run, not counting what was resumed from
    seconds: float
    tokens_per_second: float
    mfu: float


Event = RunInfo | StepMetrics | EvalMetrics | Note | RunSummary
Sink = Callable[[Event], None]


def describe(event: Event) -> str:
    """The event as a line of text."""
    match event:
        case RunInfo():
            return _describe_run(event)
        case StepMetrics():
            return (
                f"step {event.step}: loss {event.loss:.4f}, lr {event.learning_rate:.2e}, norm {event.grad_norm:.2f}, "
                f"{event.tokens_per_second:,.0f} tokens/s, mfu {event.mfu:.0%}"
            )
        case EvalMetrics():
            return _describe_evaluation(event)
        case Note():
            return event.text
        case RunSummary():
            return _describe_summary(event)


def _describe_run(info: RunInfo) -> str:
    extras = [f"on {info.num_ranks} ranks"] if info.num_ranks > 1 else []
    extras += ["compiled"] if info.compiled else []
    extras += [f"from step {info.first_step:,}"] if info.first_step else []
    return (
        f"{info.num_parameters / 1e6:.2f}M parameters; {info.dataset}: {info.num_train_tokens:,} training and "
        f"{info.num_val_tokens:,} validation tokens; " + ", ".join([f"{info.device} {info.dtype}", *extras])
    )


def _describe_evaluation(metrics: EvalMetrics) -> str:
    train = "" if metrics.train_loss is None else f"train loss {metrics.train_loss:.4f}, "
    scope = f" over all {metrics.num_tokens:,} tokens" if metrics.final else ""
    best = " (best)" if metrics.is_best else ""
    return f"step {metrics.step}: {train}val loss {metrics.val_loss:.4f}{scope}{best}"


def _describe_summary(summary: RunSummary) -> str:
    ended = {"done": "done", "interrupted": "interrupted", "max_time": "time is up", "eval_only": "evaluated"}
    loss = "" if summary.val_loss is None else f", val loss {summary.val_loss:.4f}"
    pace = "" if not summary.num_tokens else f", {summary.tokens_per_second:,.0f} tokens/s, mfu {summary.mfu:.0%}"
    return f"{ended[summary.stop_reason]} at step {summary.step:,}{loss}{pace}, {summary.seconds:.0f} s"
