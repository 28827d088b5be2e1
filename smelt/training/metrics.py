"""What a run reports: events of plain numbers and the lines that describe them; knows no model and no loop.

A sink is any function of one event. The loop sends RunInfo once, then StepMetrics, EvalMetrics and Note as they
come, and RunSummary last (none after an error). Where events go is in `sinks`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from smelt.run_configs import RunConfig


@dataclass(frozen=True, slots=True)
class RunInfo:
    """What is known before the first step."""

    config: RunConfig
    out_dir: Path
    num_parameters: int
    num_train_tokens: int
    num_val_tokens: int
    dataset: str
    device: str
    dtype: str
    first_step: int  # steps done before, when resuming
    num_steps: int  # at which the run is done
    num_ranks: int
    compiled: bool
    num_train_samples: int | None = None  # where the data is of samples, not of running text


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """One optimizer step."""

    step: int  # steps done, this one included
    loss: float  # mean over the targets of the global batch
    learning_rate: float
    grad_norm: float
    tokens_per_second: float
    mfu: float | None  # model flops over the measured matmul peak; None where they are not known
    seconds: float  # of this step
    samples_per_second: float | None = None  # where the data is of samples
    figures: dict[str, float] = field(default_factory=dict)  # such as the accuracy


@dataclass(frozen=True, slots=True)
class EvalMetrics:
    """One evaluation."""

    step: int
    train_loss: float | None  # mean of the steps since the last evaluation
    val_loss: float
    is_best: bool
    num_tokens: int  # how many validation targets were looked at
    final: bool  # the whole validation split, at the end of the run
    figures: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Note:
    """A line for a person, such as a fallback taken."""

    text: str


@dataclass(frozen=True, slots=True)
class RunSummary:
    """How a run ended."""

    out_dir: str
    step: int
    stop_reason: str  # done, no_better, interrupted, max_time or eval_only
    val_loss: float | None  # over the whole validation split; None where the run was interrupted
    best_val_loss: float | None
    num_tokens: int  # trained on by this process's run, not counting what was resumed from
    seconds: float
    tokens_per_second: float
    mfu: float | None


Event = RunInfo | StepMetrics | EvalMetrics | Note | RunSummary
Sink = Callable[[Event], None]


def describe(event: Event) -> str:
    """The event as a line of text."""
    match event:
        case RunInfo():
            return _describe_run(event)
        case StepMetrics():
            pace = (
                f"{event.tokens_per_second:,.0f} tokens/s"
                if event.samples_per_second is None
                else f"{event.samples_per_second:,.1f} samples/s"
            )
            return (
                f"step {event.step}: loss {event.loss:.4f}{_shown(event.figures)}, lr {event.learning_rate:.2e}, "
                f"norm {event.grad_norm:.2f}, {pace}{_share(event.mfu)}"
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
    samples = "" if info.num_train_samples is None else f"{info.num_train_samples:,} samples with "
    return (
        f"{info.num_parameters / 1e6:.2f}M parameters; {info.dataset}: {samples}{info.num_train_tokens:,} training and "
        f"{info.num_val_tokens:,} validation tokens; " + ", ".join([f"{info.device} {info.dtype}", *extras])
    )


def _describe_evaluation(metrics: EvalMetrics) -> str:
    train = "" if metrics.train_loss is None else f"train loss {metrics.train_loss:.4f}, "
    scope = f" over all {metrics.num_tokens:,} tokens" if metrics.final else ""
    best = " (best)" if metrics.is_best else ""
    return f"step {metrics.step}: {train}val loss {metrics.val_loss:.4f}{_shown(metrics.figures)}{scope}{best}"


def _describe_summary(summary: RunSummary) -> str:
    ended = {
        "done": "done",
        "no_better": "stopped early, since it got no better,",
        "interrupted": "interrupted",
        "max_time": "time is up",
        "eval_only": "evaluated",
    }
    loss = "" if summary.val_loss is None else f", val loss {summary.val_loss:.4f}"
    pace = "" if not summary.num_tokens else f", {summary.tokens_per_second:,.0f} tokens/s{_share(summary.mfu)}"
    return f"{ended[summary.stop_reason]} at step {summary.step:,}{loss}{pace}, {summary.seconds:.0f} s"


def _shown(figures: dict[str, float]) -> str:
    return "".join(f", {name} {value:.4f}" for name, value in figures.items())


def _share(mfu: float | None) -> str:
    return "" if mfu is None else f", mfu {mfu:.0%}"
