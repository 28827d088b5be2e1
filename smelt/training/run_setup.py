"""What runs of every recipe begin with: ranks and device, the run's folder, where it goes on, where its events go.

Knows no data and no model: those are in the recipe's job.
"""

import fcntl
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TextIO, TypeVar

import torch
from torch import nn

from smelt.configs import RUN_CONFIG, RUN_LOCK, RUN_LOG, RUN_METRICS, write_config_file
from smelt.errors import AlreadyExists, CheckpointError, OutOfSpace
from smelt.models.devices import pick_device
from smelt.run_configs import RunConfig, out_dir_of
from smelt.training.checkpoint import TrainState, read_state
from smelt.training.job import Job
from smelt.training.loop import Loop
from smelt.training.metrics import Event, Note, RunInfo, RunSummary, Sink
from smelt.training.optim import Optimizer
from smelt.training.parallel import Ranks, join, lost_ranks_explained, read_ranks, threads_per_rank
from smelt.training.sinks import endings_noted, jsonl_sink, log_sink, tensorboard_sink, wandb_sink

# Readers of a run take its lock for a moment to see whether it is held.
LOCK_ATTEMPTS, LOCK_PAUSE_S = 20, 0.01

R = TypeVar("R", bound=RunConfig)
Started = Callable[[RunConfig], object]


def no_progress(_stage: str, _num_done: int, _num_total: int | None) -> None:
    """The progress of preparing data, for somebody who does not look."""


def unnoticed(_config: RunConfig) -> None:
    """The start of a run that nobody keeps a list with."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A recipe's job, and what else is told of the run before its first step."""

    job: Job
    num_train_tokens: int
    num_val_tokens: int
    num_train_samples: int | None = None  # None where the data is running text
    checkpoint: Path | None = None  # that the run goes on from
    notes: tuple[Note, ...] = ()  # about the data


def run_prepared(
    config: R,
    prepare: Callable[[R, Ranks, torch.device], Prepared],
    sinks: Sequence[Sink] = (),
    started: Started = unnoticed,
) -> RunSummary:
    """Run what a recipe prepares, in a folder of its own; every rank of a distributed run calls this alike.

    `prepare` is given the config with its out_dir filled in. `started` hears, on the first rank, that the folder is
    now this run's. Raises what `prepare` raises; AlreadyExists and OutOfSpace before the first step; NonFiniteLoss,
    OutOfSpace and CheckpointError later on.
    """
    ranks = read_ranks(config.ranks, config.sharding)
    torch.set_num_threads(threads_per_rank(ranks, config.threads))
    device = rank_device(config, ranks)
    config = config.replace(out_dir=str(out_dir_of(config)))
    with join(ranks, device), own_folder(config, ranks, started), lost_ranks_explained(among_others=True):
        prepared = prepare(config, ranks, device)
        job = prepared.job
        if ranks.is_main and not config.eval_only:
            claim_folder(job)
        if ranks.is_main:
            job.sinks.extend([*standard_sinks(config, out_dir_of(config)), *sinks])
        differences = inexact_differences(prepared.checkpoint, job.state)
        events: list[Event] = [info_of(prepared), *prepared.notes, *differences]
        for event in events:
            for sink in job.sinks:
                sink(event)
        return Loop(job).run()


def rank_device(config: RunConfig, ranks: Ranks) -> torch.device:
    """The config's device; among several ranks on GPUs, the one of this rank."""
    device = pick_device(config.device)
    if device.type == "cuda" and ranks.world_size > 1:
        device = pick_device(f"cuda:{ranks.local_rank}")
        torch.cuda.set_device(device)
    return device


@contextmanager
def own_folder(config: RunConfig, ranks: Ranks, started: Started = unnoticed) -> Iterator[None]:
    """Hold the run's folder for this run alone, and leave word there of an error that ends it.

    AlreadyExists where it holds another run or is in use.
    """
    if not ranks.is_main or config.eval_only:
        yield
        return
    out_dir = out_dir_of(config)
    if config.init_from != "resume" and any(out_dir.glob("checkpoints/step-*")):
        raise AlreadyExists(
            f"{out_dir} already holds a run; continue it with --init-from resume, choose another --out-dir, "
            f"or remove the folder"
        )
    out_dir.mkdir(parents=True, exist_ok=True)
    with (out_dir / RUN_LOCK).open("w") as lock:
        _take_lock(lock, out_dir)
        started(config)
        with endings_noted(out_dir / RUN_METRICS):
            yield


def _take_lock(lock: TextIO, out_dir: Path) -> None:
    for _ in range(LOCK_ATTEMPTS):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(LOCK_PAUSE_S)
        else:
            return
    raise AlreadyExists(f"another process is training in {out_dir}; choose another --out-dir")


def claim_folder(job: Job) -> None:
    """Remove what lies beyond the step that the run begins with, and leave its config for who resumes it."""
    out_dir = job.checkpoints.out_dir
    job.checkpoints.forget_after(job.state.step)
    check_space(out_dir, sum(p.numel() for p in job.model.parameters() if p.requires_grad))
    write_config_file(job.config, out_dir / RUN_CONFIG)


def check_space(out_dir: Path, num_trained: int) -> None:
    """OutOfSpace where not even two checkpoints would fit: better now than after hours."""
    needed = 2 * 3 * 4 * num_trained
    free = shutil.disk_usage(out_dir).free
    if free < needed:
        raise OutOfSpace(
            f"{out_dir} has {free / 2**30:.1f} GiB free, but two checkpoints need {needed / 2**30:.1f} GiB; "
            f"free some space or choose another --out-dir"
        )


def info_of(prepared: Prepared) -> RunInfo:
    """What is told before the first step."""
    job = prepared.job
    return RunInfo(
        config=job.config,
        out_dir=job.checkpoints.out_dir,
        num_parameters=sum(parameter.numel() for parameter in job.model.parameters()),
        num_train_tokens=prepared.num_train_tokens,
        num_val_tokens=prepared.num_val_tokens,
        dataset=job.state.dataset,
        device=str(job.device),
        dtype=job.state.dtype,
        first_step=job.state.step,
        num_steps=job.num_steps,
        num_ranks=job.ranks.world_size,
        compiled=job.state.compiled,
        num_train_samples=prepared.num_train_samples,
    )


def optimizer_of(
    config: RunConfig, model: nn.Module, dtype: torch.dtype, device: torch.device, ranks: Ranks
) -> Optimizer:
    """The optimizer of a model, which it moves to the device; of this rank's part of it where the config asks for that.

    Whoever makes it holds on to no parameter of the model from before.
    """
    settings = (dtype, config.betas, config.weight_decay, config.grad_clip)
    if not ranks.in_step:
        return Optimizer(model.to(device), *settings)
    # Half a second to import, and most runs need none of it.
    from smelt.training.sharding import ShardedOptimizer, shard  # noqa: PLC0415

    shard(model, dtype, device, ranks)
    return ShardedOptimizer(model, *settings)


def initial_state(
    config: RunConfig,
    dataset: tuple[str, str],
    dtype: torch.dtype,
    ranks: Ranks,
    compiles: bool,
    resumed: TrainState | None = None,
) -> TrainState:
    """Step 0, or where a checkpoint stood; `dataset` is its name and the sha256 of what is in it.

    CheckpointError where the checkpoint was trained on other data.
    """
    name, sha256 = dataset
    if resumed and resumed.dataset_sha256 != sha256:
        raise CheckpointError(
            f"the run was trained on other data than {name} holds now (sha256 differs); resuming would mix them. "
            f"Restore the data, or start a new run from these weights: --init-from {out_dir_of(config)}"
        )
    now = TrainState(
        step=0,
        num_updates=0,
        best_val_loss=None,
        dataset=name,
        dataset_sha256=sha256,
        compiled=compiles,
        dtype=str(dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        world_size=ranks.world_size,
        torch_version=torch.__version__,
        sharding=ranks.sharding if ranks.in_step else "none",
    )
    if resumed is None:
        return now
    # Compiled and eager code differ in bits, so a resumed run goes on as it began unless told otherwise.
    keeps_compiled = resumed.compiled if config.compile == "auto" and config.sharding == "none" else now.compiled
    return replace(
        now,
        compiled=keeps_compiled,
        step=resumed.step,
        num_updates=resumed.num_updates,
        best_val_loss=resumed.best_val_loss,
        num_worse=resumed.num_worse,
    )


def inexact_differences(checkpoint: Path | None, now: TrainState) -> list[Note]:
    """What differs from the checkpoint's circumstances, so that the bits will too."""
    if checkpoint is None:
        return []
    before = read_state(checkpoint)
    names = ("dtype", "threads", "world_size", "sharding", "torch_version", "compiled")
    changed = [
        f"{name} was {getattr(before, name)}, is {getattr(now, name)}"
        for name in names
        if getattr(before, name) != getattr(now, name)
    ]
    return [Note(f"resuming, but not bit for bit: {'; '.join(changed)}")] if changed else []


def standard_sinks(config: RunConfig, out_dir: Path) -> list[Sink]:
    """metrics.jsonl, log.txt, and the services that the config turns on."""
    if config.eval_only:
        return []
    sinks = [
        jsonl_sink(out_dir / RUN_METRICS, config.log_interval),
        log_sink(out_dir / RUN_LOG, config.log_interval),
    ]
    sinks += [tensorboard_sink(config, out_dir)] if config.tensorboard else []
    sinks += [wandb_sink(config, out_dir)] if config.wandb else []
    return sinks
