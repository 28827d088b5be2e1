"""The training loop: steps, evaluations, checkpoints and a clean stop; knows no files but through `Checkpoints`.

What is trained on what is settled by a recipe, in its `Job`; what happens to the figures is the sinks' business.
"""

import math
import signal
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain, pairwise
from types import FrameType
from typing import Any, TypeVar

import numpy as np
import torch

from smelt.errors import NonFiniteLoss
from smelt.models.devices import matmul_peak, seed_generator, synchronize
from smelt.training.gradient_sum import GradientSum, ShardedSum
from smelt.training.job import Evaluation, Job
from smelt.training.metrics import EvalMetrics, Event, RunSummary, StepMetrics
from smelt.training.step import step

T = TypeVar("T")


class StopRequest:
    """Set by the first SIGINT or SIGTERM; the second one interrupts at once."""

    def __init__(self) -> None:
        self.received = False

    def handle(self, number: int, _frame: FrameType | None) -> None:
        """Note the wish to stop after this step."""
        if self.received:
            raise KeyboardInterrupt
        self.received = True


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Turn SIGINT and SIGTERM into a request while the block runs (in the main thread; others cannot)."""
    request = StopRequest()
    previous: dict[signal.Signals, Any] = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, request.handle)
    except ValueError:  # not the main thread: its owner stops the run some other way
        previous.clear()
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@dataclass(slots=True)
class Progress:
    """What changes while a run goes on."""

    steps_done: int
    best_val_loss: float | None
    last_saved_step: int | None
    num_worse: int = 0  # evaluations since the best one
    losses_since_eval: list[float] = field(default_factory=list)
    figures_since_eval: list[dict[str, float]] = field(default_factory=list)
    num_tokens: int = 0
    train_seconds: float = 0.0


class Loop:
    """One run from its state to its end."""

    def __init__(self, job: Job) -> None:
        self.job = job
        first = job.state.step
        self.progress = Progress(first, job.state.best_val_loss, first or None, job.state.num_worse)
        self.started = time.perf_counter()
        self.gradient_sum = (
            ShardedSum(job.model, job.ranks) if job.ranks.in_step else GradientSum(job.model, job.optimizer, job.ranks)
        )
        self.peak_flops = matmul_peak(job.device, job.dtype) * job.ranks.world_size

    def run(self) -> RunSummary:
        """Train until the last step, max_time or a signal; whatever ends it, the last step is saved."""
        job = self.job
        with stop_on_signals() as request:
            try:
                stop_reason = "eval_only" if job.config.eval_only else self._train(request)
                request.received = True  # everything is saved: from here on Ctrl-C ends at once
                val_loss = None if stop_reason == "interrupted" else self._evaluate_finally()
            finally:
                job.checkpoints.wait()
        summary = self._summarize(stop_reason, val_loss)
        self._send(summary)
        return summary

    def _train(self, request: StopRequest) -> str:
        job, progress = self.job, self.progress
        stop_reason = "done"
        while progress.steps_done < job.num_steps:
            stopping = self._train_step(request)
            if stopping:
                stop_reason = "interrupted" if request.received else "max_time"
                break
            if progress.steps_done % job.eval_interval == 0 and progress.steps_done < job.num_steps:
                self._evaluate_and_save()
                if job.patience is not None and progress.num_worse >= job.patience:
                    stop_reason = "no_better"
                    break
        if stop_reason == "interrupted":
            if progress.last_saved_step != progress.steps_done:
                self._settle()
                self._save(is_best=False)
        elif progress.last_saved_step != progress.steps_done:
            self._evaluate_and_save(always=True)
        return stop_reason

    def _train_step(self, request: StopRequest) -> bool:
        """One optimizer step, unless it is given up; returns whether a rank wants to stop after it."""
        job, progress = self.job, self.progress
        start = time.perf_counter()
        size = job.train_batches.size(progress.steps_done)
        gradients = self._gradients(size.num_targets, request)
        if gradients is None:
            return True
        loss, figures = gradients
        learning_rate = job.learning_rate(progress.steps_done)
        job.checkpoints.wait_until_copied()
        norm = job.optimizer.step(learning_rate)
        if norm is None and job.optimizer.loss_scale is None:
            raise self._non_finite("gradient", math.nan)
        synchronize(job.device)
        seconds = time.perf_counter() - start
        progress.steps_done += 1
        progress.num_tokens += size.num_tokens
        progress.train_seconds += seconds
        progress.losses_since_eval.append(loss)
        progress.figures_since_eval.append(figures)
        tokens_per_second = size.num_tokens / seconds
        self._send(
            StepMetrics(
                step=progress.steps_done,
                loss=loss,
                learning_rate=learning_rate,
                grad_norm=math.nan if norm is None else norm,
                tokens_per_second=tokens_per_second,
                mfu=self._mfu(tokens_per_second),
                seconds=seconds,
                samples_per_second=None if size.num_samples is None else size.num_samples / seconds,
                figures=figures,
            )
        )
        time_is_up = job.config.max_time is not None and progress.train_seconds >= job.config.max_time
        return job.ranks.agree_on(request.received or time_is_up, job.device)

    def _gradients(self, num_targets: int, request: StopRequest) -> tuple[float, dict[str, float]] | None:
        """Accumulate the gradients of one global batch over micro-batches and ranks; its mean loss and figures.

        None where a lone rank shall stop before the last micro-batch: the step has not been, and is done on resuming.
        """
        job, now = self.job, self.progress.steps_done
        if job.has_dropout:
            seed_generator(job.device, dropout_seed(job.config.seed, now, job.ranks.rank))
        scale = 1.0 / num_targets
        loss_scale = job.optimizer.loss_scale.value if job.optimizer.loss_scale else 1.0
        totals = torch.zeros(1 + len(job.figures), device=job.device)
        own = job.ranks.passes(lambda rank: job.train_batches.micro_batches(now, job.device, rank))
        for (batch, counts), is_last in told_the_last(own):
            if request.received and job.ranks.world_size == 1:
                job.optimizer.zero_gradients()
                return None
            if is_last:
                self.gradient_sum.begin()
            value = step(job.model, batch, job.loss, scale * loss_scale * counts)
            totals += counts * torch.stack([value.total, *(value.metrics[name] for name in job.figures)])
        self.gradient_sum.finish()
        loss, *figures = (total * scale for total in job.ranks.sum_(totals).tolist())
        if not math.isfinite(loss):
            raise self._non_finite("loss", loss)
        return loss, dict(zip(job.figures, figures, strict=True))

    def _non_finite(self, what: str, value: float) -> NonFiniteLoss:
        now = self.progress.steps_done
        where = self.job.train_batches.describe(now)
        saved = self.progress.last_saved_step
        good = "there is no checkpoint yet" if saved is None else f"the last good checkpoint is step {saved}"
        return NonFiniteLoss(
            f"the {what} became {value} at step {now + 1}, in a batch {where}; {good} "
            f"in {self.job.checkpoints.out_dir}. Lower --learning-rate, raise --warmup-iters or look at this data"
        )

    def _evaluate_and_save(self, always: bool = False) -> None:
        job, progress = self.job, self.progress
        self._settle()
        if job.evaluate is None:
            self._save(is_best=False)
            return
        evaluation = job.evaluate(job.config.eval_iters)
        is_best = progress.best_val_loss is None or evaluation.loss < progress.best_val_loss
        progress.num_worse = 0 if is_best else progress.num_worse + 1
        if is_best:
            progress.best_val_loss = evaluation.loss
        train_loss = _mean(progress.losses_since_eval)
        seen = {name: _mean([figures[name] for figures in progress.figures_since_eval]) for name in self.job.figures}
        shown = {f"train_{name}": value for name, value in seen.items() if value is not None}
        progress.losses_since_eval.clear()
        progress.figures_since_eval.clear()
        evaluation = replace(evaluation, figures={**shown, **evaluation.figures})
        self._send_evaluation(evaluation, train_loss, is_best, final=False)
        if always or is_best or job.config.always_save_checkpoint:
            self._save(is_best)

    def _settle(self) -> None:
        """All weights are read next: in turn at each evaluation, and out of turn where a run ends before."""
        self.job.optimizer.settle(out_of_turn=self.progress.steps_done % self.job.eval_interval != 0)

    def _evaluate_finally(self) -> float | None:
        """The last evaluation looks at all or much of the split, and is no candidate for the best."""
        job = self.job
        if job.evaluate is None:
            return None
        evaluation = job.evaluate(None if job.config.eval_only else job.final_eval_batches)
        self._send_evaluation(evaluation, None, is_best=False, final=True)
        return evaluation.loss

    def _send_evaluation(self, evaluation: Evaluation, train_loss: float | None, is_best: bool, final: bool) -> None:
        self._send(
            EvalMetrics(
                step=self.progress.steps_done,
                train_loss=train_loss,
                val_loss=evaluation.loss,
                is_best=is_best,
                num_tokens=evaluation.num_targets,
                final=final,
                figures=evaluation.figures,
            )
        )

    def _save(self, is_best: bool) -> None:
        job, progress = self.job, self.progress
        progress.last_saved_step = progress.steps_done
        if job.optimizer.is_sharded:
            job.checkpoints.gather(job.optimizer, keep=job.ranks.is_main)
        if not job.ranks.is_main:
            return
        scale = job.optimizer.loss_scale
        state = replace(
            job.state,
            step=progress.steps_done,
            num_updates=job.optimizer.num_steps,
            best_val_loss=progress.best_val_loss,
            num_worse=progress.num_worse,
            loss_scale=scale.value if scale else None,
            num_good_steps=scale.num_good_steps if scale else 0,
        )
        job.checkpoints.save(job.optimizer, state, is_best)

    def _summarize(self, stop_reason: str, val_loss: float | None) -> RunSummary:
        progress = self.progress
        pace = progress.num_tokens / progress.train_seconds if progress.train_seconds else 0.0
        return RunSummary(
            out_dir=str(self.job.checkpoints.out_dir),
            step=progress.steps_done,
            stop_reason=stop_reason,
            val_loss=val_loss,
            best_val_loss=progress.best_val_loss,
            num_tokens=progress.num_tokens,
            seconds=time.perf_counter() - self.started,
            tokens_per_second=pace,
            mfu=self._mfu(pace),
        )

    def _mfu(self, tokens_per_second: float) -> float | None:
        flops = self.job.flops_per_token
        return None if flops is None else tokens_per_second * flops / self.peak_flops

    def _send(self, event: Event) -> None:
        for sink in self.job.sinks:
            sink(event)


def told_the_last(items: Iterable[T]) -> Iterator[tuple[T, bool]]:
    """Each item, and whether it is the last."""
    end: Any = object()
    for item, following in pairwise(chain(items, [end])):
        yield item, following is end


def dropout_seed(seed: int, step: int, rank: int) -> int:
    """A seed for every step and rank, so that a resumed step drops what it would have dropped."""
    return int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None
