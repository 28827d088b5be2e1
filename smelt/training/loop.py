"""The training loop: steps, evaluations, checkpoints and a clean stop; knows no files but through `Checkpoints`.

What is trained on what is settled in `recipes`; what happens to the figures is the sinks' business.
"""

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import FrameType
from typing import Any

import numpy as np
import torch

from smelt.configs import TrainConfig
from smelt.errors import NonFiniteLoss
from smelt.models.decoder import Decoder
from smelt.models.devices import matmul_peak, synchronize
from smelt.training.batches import EvalBatches, TrainBatches
from smelt.training.checkpoint import Checkpoints, TrainState
from smelt.training.losses import Loss
from smelt.training.metrics import EvalMetrics, Event, RunSummary, Sink, StepMetrics
from smelt.training.optim import Optimizer, cosine_with_warmup
from smelt.training.parallel import Ranks
from smelt.training.step import measure, step

FINAL_EVAL_TOKENS = 500_000  # the last evaluation takes the whole validation split, or this much of a huge one


@dataclass
class Job:
    """All that a loop needs, made by a recipe."""

    config: TrainConfig
    model: Decoder
    optimizer: Optimizer
    loss: Loss
    eval_loss: Loss  # the same, never compiled: evaluation has batches of other sizes
    train_batches: TrainBatches
    eval_batches: EvalBatches
    checkpoints: Checkpoints
    state: TrainState
    ranks: Ranks
    device: torch.device
    dtype: torch.dtype
    sinks: list[Sink]


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
    losses_since_eval: list[float] = field(default_factory=list)
    num_tokens: int = 0
    train_seconds: float = 0.0


class Loop:
    """One run from its state to its end."""

    def __init__(self, job: Job) -> None:
        self.job = job
        first = job.state.step
        self.progress = Progress(first, job.state.best_val_loss, first or None)
        self.started = time.perf_counter()
        self.peak_flops = matmul_peak(job.device, job.dtype) * job.ranks.world_size
        shape = job.model.config.replace(block_size=job.eval_batches.block_size)
        self.flops_per_token = shape.flops_per_token

    def run(self) -> RunSummary:
        """Train until max_iters, max_time or a signal; whatever ends it, the last step is saved."""
        job = self.job
        with stop_on_signals() as request:
            try:
                stop_reason = "eval_only" if job.config.eval_only else self._train(request)
                request.received = True  # everything is saved: from here on Ctrl-C ends at once
                val_loss = None if stop_reason == "interrupted" else self._evaluate_whole(stop_reason)
            finally:
                job.checkpoints.wait()
        summary = self._summarize(stop_reason, val_loss)
        self._send(summary)
        return summary

    def _train(self, request: StopRequest) -> str:
        config, progress = self.job.config, self.progress
        stop_reason = "done"
        while progress.steps_done < config.max_iters:
            stopping = self._train_step(request)
            if stopping:
                stop_reason = "interrupted" if request.received else "max_time"
                break
            if progress.steps_done % config.eval_interval == 0 and progress.steps_done < config.max_iters:
                self._evaluate_and_save()
        if stop_reason == "interrupted":
            self._save(is_best=False)
        elif progress.last_saved_step != progress.steps_done:
            self._evaluate_and_save(always=True)
        return stop_reason

    def _train_step(self, request: StopRequest) -> bool:
        """One optimizer step; returns whether a rank wants to stop after it."""
        job, progress = self.job, self.progress
        start = time.perf_counter()
        loss = self._gradients()
        learning_rate = cosine_with_warmup(progress.steps_done, *job.config.learning_rate_schedule())
        job.checkpoints.wait_until_copied()
        norm = job.optimizer.step(learning_rate)
        if norm is None and job.optimizer.loss_scale is None:
            raise self._non_finite("gradient", math.nan)
        synchronize(job.device)
        seconds = time.perf_counter() - start
        progress.steps_done += 1
        progress.num_tokens += job.train_batches.num_tokens
        progress.train_seconds += seconds
        progress.losses_since_eval.append(loss)
        tokens_per_second = job.train_batches.num_tokens / seconds
        self._send(
            StepMetrics(
                step=progress.steps_done,
                loss=loss,
                learning_rate=learning_rate,
                grad_norm=math.nan if norm is None else norm,
                tokens_per_second=tokens_per_second,
                mfu=self._mfu(tokens_per_second),
                seconds=seconds,
            )
        )
        time_is_up = job.config.max_time is not None and progress.train_seconds >= job.config.max_time
        return job.ranks.agree_on(request.received or time_is_up, job.device)

    def _gradients(self) -> float:
        """Accumulate the gradients of one global batch over micro-batches and ranks; returns its mean loss."""
        job, now = self.job, self.progress.steps_done
        if job.model.dropout:
            torch.manual_seed(dropout_seed(job.config.seed, now, job.ranks.rank))
        scale = 1.0 / job.train_batches.num_tokens
        loss_scale = job.optimizer.loss_scale.value if job.optimizer.loss_scale else 1.0
        total = torch.zeros((), device=job.device)
        for batch in job.train_batches.micro_batches(now, job.device):
            total += step(job.model, batch, job.loss, scale * loss_scale).total
        loss = float(job.ranks.sum_(total)) * scale
        if not math.isfinite(loss):
            raise self._non_finite("loss", loss)
        for gradients in job.optimizer.gradients():
            job.ranks.sum_(gradients)
        return loss

    def _non_finite(self, what: str, value: float) -> NonFiniteLoss:
        now = self.progress.steps_done
        documents = ", ".join(map(str, self.job.train_batches.documents(now)[:20]))
        saved = self.progress.last_saved_step
        good = "there is no checkpoint yet" if saved is None else f"the last good checkpoint is step {saved}"
        return NonFiniteLoss(
            f"the {what} became {value} at step {now + 1}, in a batch that begins in documents {documents}; {good} "
            f"in {self.job.checkpoints.out_dir}. Lower --learning-rate, raise --warmup-iters or look at these documents"
        )

    def _evaluate_and_save(self, always: bool = False) -> None:
        progress = self.progress
        val_loss, num_tokens = self._val_loss(self.job.config.eval_iters)
        is_best = progress.best_val_loss is None or val_loss < progress.best_val_loss
        if is_best:
            progress.best_val_loss = val_loss
        train_loss = _mean(progress.losses_since_eval)
        progress.losses_since_eval.clear()
        self._send(EvalMetrics(progress.steps_done, train_loss, val_loss, is_best, num_tokens, final=False))
        if always or is_best or self.job.config.always_save_checkpoint:
            self._save(is_best)

    def _evaluate_whole(self, stop_reason: str) -> float:
        job = self.job
        rows = job.eval_batches.num_rows * job.eval_batches.block_size
        max_batches = None if stop_reason == "eval_only" else max(1, FINAL_EVAL_TOKENS // rows)
        val_loss, num_tokens = self._val_loss(max_batches)
        self._send(EvalMetrics(self.progress.steps_done, None, val_loss, False, num_tokens, final=True))
        return val_loss

    def _val_loss(self, max_batches: int | None) -> tuple[float, int]:
        """Mean loss per token over all ranks, and over how many tokens."""
        job = self.job
        sums = torch.zeros(2, dtype=torch.float64)
        for batch in job.eval_batches.batches(max_batches, job.device):
            value = measure(job.model, batch, job.eval_loss)
            sums += torch.tensor([float(value.total), value.num_targets], dtype=torch.float64)
        total, num_tokens = job.ranks.sum_(sums.to(_reducible(job.device))).tolist()
        return total / num_tokens, int(num_tokens)

    def _save(self, is_best: bool) -> None:
        job, progress = self.job, self.progress
        progress.last_saved_step = progress.steps_done
        if not job.ranks.is_main:
            return
        scale = job.optimizer.loss_scale
        state = replace(
            job.state,
            step=progress.steps_done,
            num_updates=job.optimizer.num_steps,
            best_val_loss=progress.best_val_loss,
            loss_scale=scale.value if scale else None,
            num_good_steps=scale.num_good_steps if scale else 0,
        )
        job.checkpoints.save(job.model, job.optimizer, state, is_best)

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

    def _mfu(self, tokens_per_second: float) -> float:
        return tokens_per_second * self.flops_per_token / self.peak_flops

    def _send(self, event: Event) -> None:
        for sink in self.job.sinks:
            sink(event)


def dropout_seed(seed: int, step: int, rank: int) -> int:
    """A seed for every step and rank, so that a resumed step drops what it would have dropped."""
    return int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _reducible(device: torch.device) -> torch.device:
    """Where a tensor must lie for the ranks to add it."""
    return device if device.type == "cuda" else torch.device("cpu")
