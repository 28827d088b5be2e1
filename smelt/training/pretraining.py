"""Recipes: from a config to a finished run. `pretrain` covers training from scratch, resuming and fine-tuning.

Knows which data, tokenizer, weights and device a config means; the steps themselves are in `loop`.
"""

import fcntl
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from smelt.configs import (
    RUN_CONFIG,
    RUN_LOCK,
    RUN_LOG,
    RUN_METRICS,
    DecoderConfig,
    TrainConfig,
    read_config_file,
    write_config_file,
)
from smelt.data.datasets import MANIFEST_FILE, Dataset, dataset_folder, open_dataset
from smelt.data.packing import BlockOrder
from smelt.data.preparation import PrepareOptions, dataset_for, retokenize
from smelt.data.sources import Progress
from smelt.data.tokenizers import Tokenizer
from smelt.errors import AlreadyExists, CheckpointError, ConfigError, NotFound, OutOfSpace
from smelt.models.decoder import Decoder
from smelt.models.devices import pick_device, pick_dtype
from smelt.models.folders import read_config, read_tokenizer
from smelt.models.loading import load_model
from smelt.models.registry import resolve
from smelt.training.batches import EvalBatches, TrainBatches
from smelt.training.checkpoint import Checkpoints, TrainState, latest, read_state, restore
from smelt.training.compiling import compiled, wants_compile
from smelt.training.loop import Job, Loop
from smelt.training.losses import on_tokens
from smelt.training.metrics import Note, RunInfo, RunSummary, Sink
from smelt.training.optim import Optimizer
from smelt.training.parallel import Ranks, join, read_ranks, threads_per_rank
from smelt.training.sinks import endings_noted, jsonl_sink, log_sink, tensorboard_sink, wandb_sink

SHAPE_FIELDS = ("preset", "n_layer", "n_head", "n_embd")
# Readers of a run take its lock for a moment to see whether it is held.
LOCK_ATTEMPTS, LOCK_PAUSE_S = 20, 0.01


def no_progress(_stage: str, _num_done: int, _num_total: int | None) -> None:
    """The progress of preparing data, for somebody who does not look."""


def unnoticed(_config: TrainConfig) -> None:
    """The start of a run that nobody keeps a list with."""


@dataclass(frozen=True, slots=True)
class Start:
    """What a run begins with. A checkpoint's weights stay on the disk until `restore` reads all of its tensors."""

    shape: DecoderConfig
    weights: dict[str, Tensor] | None  # of another model; None where a checkpoint has them
    tokenizer: Tokenizer | None  # the model's own; None where the dataset brings it
    checkpoint: Path | None  # to resume from


def resumed_values(values: dict[str, Any]) -> dict[str, Any]:
    """The saved config of the run in `out_dir`, with the given values on top. NotFound where there is no run."""
    saved = Path(values.get("out_dir") or "out") / RUN_CONFIG
    if not saved.is_file():
        raise NotFound(f"nothing to resume: {saved} does not exist; give the run's folder as --out-dir")
    return {**read_config_file(saved), **values}


def pretrain(
    config: TrainConfig,
    datasets_folder: Path,
    models_folder: Path,
    sinks: Sequence[Sink] = (),
    progress: Progress = no_progress,
    started: Callable[[TrainConfig], object] = unnoticed,
) -> RunSummary:
    """Train a language model as `config` says; every rank of a distributed run calls this alike.

    `progress` hears about the preparation of data that was not prepared before; `started`, on the first rank, that
    the run's folder is now its own.

    Raises ConfigError, NotFound, NotEnoughData and AlreadyExists before anything is computed; NonFiniteLoss,
    OutOfSpace and CheckpointError later on.
    """
    ranks = read_ranks()
    torch.set_num_threads(threads_per_rank(ranks, config.threads))
    device = rank_device(config, ranks)
    config = config.replace(out_dir=str(out_dir_of(config)))
    with join(ranks, device), own_folder(config, ranks, started):
        start = read_start(config, models_folder)
        dataset = open_data_in_turn(config, datasets_folder, start, ranks, progress)
        job, info = prepare_job(config, start, dataset, ranks, device)
        if ranks.is_main:
            job.sinks.extend([*standard_sinks(config, info.out_dir), *sinks])
        for sink in job.sinks:
            sink(info)
        for difference in inexact_differences(start, job.state):
            for sink in job.sinks:
                sink(Note(difference))
        return Loop(job).run()


def rank_device(config: TrainConfig, ranks: Ranks) -> torch.device:
    """The config's device; among several ranks on GPUs, the one of this rank."""
    device = pick_device(config.device)
    if device.type == "cuda" and ranks.world_size > 1:
        device = pick_device(f"cuda:{ranks.local_rank}")
        torch.cuda.set_device(device)
    return device


def out_dir_of(config: TrainConfig) -> Path:
    """The run's folder: as given, or `out`, or `out-MODEL` when it starts from a model."""
    if config.out_dir is not None:
        return Path(config.out_dir)
    if config.init_from in ("scratch", "resume"):
        return Path("out")
    return Path(f"out-{Path(config.init_from.removeprefix('hf:')).name}")


@contextmanager
def own_folder(
    config: TrainConfig, ranks: Ranks, started: Callable[[TrainConfig], object] = unnoticed
) -> Iterator[None]:
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


def prepare_job(
    config: TrainConfig, start: Start | None, dataset: Dataset, ranks: Ranks, device: torch.device
) -> tuple[Job, RunInfo]:
    """Put together what the loop needs."""
    model = build_model(config, start, dataset)
    block_size = training_block_size(config, model.config)
    dtype = pick_dtype(config.dtype, device)
    num_rows = config.batch_size * config.gradient_accumulation_steps
    train, val = dataset.split("train"), dataset.split("val")
    train_batches = TrainBatches(
        train, BlockOrder(train.num_tokens, block_size, config.seed), ranks, num_rows, config.batch_size
    )
    optimizer = Optimizer(model.to(device), dtype, config.betas, config.weight_decay, config.grad_clip)
    state = initial_state(config, start, model, optimizer, dataset, dtype, ranks)
    sinks: list[Sink] = []
    loss = on_tokens("cross_entropy")
    job = Job(
        config=config,
        model=model.train(),
        optimizer=optimizer,
        loss=compiled(loss, sinks) if state.compiled else loss,
        eval_loss=loss,
        train_batches=train_batches,
        eval_batches=EvalBatches(val, block_size, ranks, config.batch_size),
        checkpoints=Checkpoints(out_dir_of(config), config.keep_checkpoints, dataset.tokenizer.save),
        state=state,
        ranks=ranks,
        device=device,
        dtype=dtype,
        sinks=sinks,
    )
    if ranks.is_main and not config.eval_only:
        job.checkpoints.forget_after(state.step)
        check_space(out_dir_of(config), model.config)
        write_config_file(config, out_dir_of(config) / RUN_CONFIG)
    info = RunInfo(
        config=config,
        out_dir=out_dir_of(config),
        num_parameters=model.config.num_parameters,
        num_train_tokens=train.num_tokens,
        num_val_tokens=val.num_tokens,
        dataset=dataset.name,
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        first_step=state.step,
        num_ranks=ranks.world_size,
        compiled=state.compiled,
    )
    return job, info


def read_start(config: TrainConfig, models_folder: Path) -> Start | None:
    """The weights and tokenizer that the run begins with; None from scratch."""
    if config.init_from == "scratch":
        return None
    if config.init_from == "resume":
        checkpoint = latest(out_dir_of(config))
        return Start(read_config(checkpoint), None, read_tokenizer(checkpoint), checkpoint)
    given = [name for name in SHAPE_FIELDS if getattr(config, name) is not None]
    if given:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ConfigError(f"{flags} cannot change the shape of {config.init_from}; leave them out")
    model, tokenizer = load_model(resolve(config.init_from, models_folder), torch.float32)
    return Start(model.config, model.state_dict(), tokenizer, None)


def open_data_in_turn(
    config: TrainConfig, datasets_folder: Path, start: Start | None, ranks: Ranks, progress: Progress
) -> Dataset:
    """The run's dataset: rank 0 prepares it where need be, the others find it ready."""
    if not ranks.is_main:
        ranks.wait_for_main()
    dataset = open_data(config, datasets_folder, start, progress)
    if ranks.is_main:
        ranks.wait_for_main()
    return dataset


def open_data(config: TrainConfig, datasets_folder: Path, start: Start | None, progress: Progress) -> Dataset:
    """The dataset that the config names, in the tokens of the model where one is given."""
    if start and start.checkpoint:
        known = datasets_folder / read_state(start.checkpoint).dataset
        if (known / MANIFEST_FILE).is_file():
            return open_dataset(known)
    tokenizer = start.tokenizer if start else None
    if config.dataset is not None:
        dataset = open_dataset(dataset_folder(datasets_folder, config.dataset))
        wanted = tokenizer or config.tokenizer
        return retokenize(dataset, wanted, datasets_folder, progress) if wanted else dataset
    if config.data_path is None:
        raise ConfigError(
            "no data to train on: give --data-path (a file, folder, URL, hf:ORG/NAME or builtin:pydoc) "
            "or --dataset (a name from `smelt data ls`)"
        )
    block_size = config.block_size or (start.shape if start else config.decoder_config(1)).block_size
    options = PrepareOptions(val_fraction=config.train_val_split, block_size=block_size)
    wanted = tokenizer or config.tokenizer or "bpe:4096"
    return dataset_for(config.data_path, datasets_folder, tokenizer=wanted, options=options, progress=progress)


def build_model(config: TrainConfig, start: Start | None, dataset: Dataset) -> Decoder:
    """A fresh model of the config's shape, or the given one with the run's dropout."""
    if start is None:
        model = Decoder(config.decoder_config(dataset.tokenizer.vocab_size), config.dropout)
        model.initialize(config.seed)
    else:
        model = Decoder(start.shape, config.dropout)
        if start.weights is not None:
            model.load_state_dict(start.weights)
    if dataset.tokenizer.vocab_size > model.config.vocab_size:
        raise ConfigError(
            f"dataset {dataset.name} has {dataset.tokenizer.vocab_size} token ids, but the model knows only "
            f"{model.config.vocab_size}; use the model's own tokenizer"
        )
    model.gradient_checkpointing = config.gradient_checkpointing
    return model


def training_block_size(config: TrainConfig, shape: DecoderConfig) -> int:
    """Tokens per row: the config's, at most the model's context."""
    block_size = config.block_size or shape.block_size
    if block_size > shape.block_size:
        raise ConfigError(f"--block-size {block_size} is longer than the model's context of {shape.block_size} tokens")
    return block_size


def initial_state(
    config: TrainConfig,
    start: Start | None,
    model: Decoder,
    optimizer: Optimizer,
    dataset: Dataset,
    dtype: torch.dtype,
    ranks: Ranks,
) -> TrainState:
    """Step 0, or what the checkpoint holds, loaded into model and optimizer."""
    resumed = restore(start.checkpoint, model, optimizer) if start and start.checkpoint else None
    if resumed and resumed.dataset_sha256 != dataset.sha256:
        raise CheckpointError(
            f"the run was trained on other data than {dataset.name} holds now (sha256 differs); resuming would mix "
            f"them. Restore the data, or start a new run from these weights: --init-from {start and start.checkpoint}"
        )
    num_steps = config.max_iters - (resumed.step if resumed else 0)
    tokens = (
        num_steps * config.batch_size * config.gradient_accumulation_steps * training_block_size(config, model.config)
    )
    device = next(model.parameters()).device
    now = TrainState(
        step=0,
        num_updates=0,
        best_val_loss=None,
        dataset=dataset.name,
        dataset_sha256=dataset.sha256,
        compiled=wants_compile(config, tokens * model.config.flops_per_token, device, dtype),
        dtype=str(dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        world_size=ranks.world_size,
        torch_version=torch.__version__,
    )
    if resumed is None:
        return now
    # Compiled and eager code differ in bits, so a resumed run goes on as it began unless told otherwise.
    keeps_compiled = resumed.compiled if config.compile == "auto" else now.compiled
    return replace(
        now,
        compiled=keeps_compiled,
        step=resumed.step,
        num_updates=resumed.num_updates,
        best_val_loss=resumed.best_val_loss,
    )


def inexact_differences(start: Start | None, now: TrainState) -> list[str]:
    """What differs from the checkpoint's circumstances, so that the bits will too."""
    if start is None or start.checkpoint is None:
        return []
    before = read_state(start.checkpoint)
    names = ("dtype", "threads", "world_size", "torch_version", "compiled")
    changed = [
        f"{name} was {getattr(before, name)}, is {getattr(now, name)}"
        for name in names
        if getattr(before, name) != getattr(now, name)
    ]
    return [f"resuming, but not bit for bit: {'; '.join(changed)}"] if changed else []


def check_space(out_dir: Path, shape: DecoderConfig) -> None:
    """OutOfSpace where not even two checkpoints would fit: better now than after hours."""
    needed = 2 * 3 * 4 * shape.num_parameters
    free = shutil.disk_usage(out_dir).free
    if free < needed:
        raise OutOfSpace(
            f"{out_dir} has {free / 2**30:.1f} GiB free, but two checkpoints need {needed / 2**30:.1f} GiB; "
            f"free some space or choose another --out-dir"
        )


def standard_sinks(config: TrainConfig, out_dir: Path) -> list[Sink]:
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
