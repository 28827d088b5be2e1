"""Pretraining: a language model from scratch, from where a run stopped, or from another model, on running text.

Knows which data, tokenizer and weights a config means; what all recipes share is in `run_setup`.
"""

import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from smelt.configs import DecoderConfig
from smelt.data.datasets import MANIFEST_FILE, Dataset, dataset_folder, kept, open_dataset
from smelt.data.packing import BlockOrder
from smelt.data.preparation import PrepareOptions, dataset_for, retokenize
from smelt.data.sources import Progress
from smelt.data.tokenizers import Tokenizer
from smelt.errors import ConfigError
from smelt.models.decoder import Decoder
from smelt.models.devices import pick_dtype
from smelt.models.folders import read_config, read_tokenizer
from smelt.models.hub import TOKENIZER_FILES
from smelt.models.loading import load_model
from smelt.models.registry import resolve
from smelt.models.tensor_file import Pause
from smelt.models.weights import from_hf_tensors, read_tensors, write_model
from smelt.run_configs import TrainConfig, learning_rates, out_dir_of
from smelt.training.batches import BlockBatches, EvalBatches
from smelt.training.checkpoint import Checkpoints, WeightFiles, latest, read_state, restore
from smelt.training.compiling import compiled, wants_compile
from smelt.training.job import Evaluation, Job, evaluate_batches
from smelt.training.losses import on_tokens
from smelt.training.metrics import RunSummary, Sink
from smelt.training.optim import cosine_with_warmup
from smelt.training.parallel import Ranks
from smelt.training.run_setup import (
    Prepared,
    Started,
    initial_state,
    no_progress,
    optimizer_of,
    run_prepared,
    unnoticed,
)

SHAPE_FIELDS = ("preset", "n_layer", "n_head", "n_embd")
FINAL_EVAL_TOKENS = 500_000  # the last evaluation takes the whole validation split, or this much of a huge one


@dataclass(frozen=True, slots=True)
class Start:
    """What a run begins with. A checkpoint's weights stay on the disk until `restore` reads all of its tensors."""

    shape: DecoderConfig
    weights: dict[str, Tensor] | None  # of another model; None where a checkpoint has them
    tokenizer: Tokenizer | None  # the model's own; None where the dataset brings it
    checkpoint: Path | None  # to resume from


def pretrain(
    config: TrainConfig,
    datasets_folder: Path,
    models_folder: Path,
    sinks: Sequence[Sink] = (),
    progress: Progress = no_progress,
    started: Started = unnoticed,
) -> RunSummary:
    """Train a language model as `config` says.

    `progress` hears about the preparation of data that was not prepared before; `started`, on the first rank, that
    the run's folder is now its own. Raises ConfigError, NotFound, NotEnoughData and what `run_prepared` raises.
    """

    with ExitStack() as until_end:

        def prepare(config: TrainConfig, ranks: Ranks, device: torch.device) -> Prepared:
            start = read_start(config, models_folder)
            dataset = open_data_in_turn(config, datasets_folder, start, ranks, progress)
            until_end.enter_context(kept(dataset.folder))
            return prepare_job(config, start, dataset, ranks, device)

        return run_prepared(config, prepare, sinks, started)


def prepare_job(
    config: TrainConfig, start: Start | None, dataset: Dataset, ranks: Ranks, device: torch.device
) -> Prepared:
    """Put together what the loop needs."""
    model = build_model(config, start, dataset)
    block_size = training_block_size(config, model.config)
    dtype = pick_dtype(config.dtype, device)
    num_rows = config.batch_size * config.gradient_accumulation_steps
    train, val = dataset.split("train"), dataset.split("val")
    order = BlockOrder(train.num_tokens, block_size, config.seed)
    optimizer = optimizer_of(config, model, dtype, device, ranks)
    weight_files = model_files(model.config, dataset.tokenizer)
    checkpoint = start.checkpoint if start else None
    resumed = restore(checkpoint, weight_files, optimizer) if checkpoint else None
    num_tokens = (config.max_iters - (resumed.step if resumed else 0)) * num_rows * block_size
    compiles = wants_compile(config, num_tokens * model.config.flops_per_token, device, dtype)
    state = initial_state(config, (dataset.name, dataset.sha256), dtype, ranks, compiles, resumed)
    rates = learning_rates(config, config.learning_rate, config.max_iters)
    sinks: list[Sink] = []
    loss = on_tokens("cross_entropy")
    eval_batches = EvalBatches(val, block_size, ranks, config.batch_size)

    def evaluate(max_batches: int | None) -> Evaluation:
        # Never compiled: evaluation has batches of other sizes.
        return evaluate_batches(model, loss, partial(eval_batches.batches, max_batches, device), ranks, device)

    job = Job(
        config=config,
        num_steps=config.max_iters,
        learning_rate=lambda step: cosine_with_warmup(step, *rates),
        model=model.train(),
        has_dropout=config.dropout > 0,
        optimizer=optimizer,
        loss=compiled(loss, sinks) if state.compiled else loss,
        train_batches=BlockBatches(train, order, ranks, num_rows, config.batch_size),
        evaluate=evaluate,
        eval_interval=config.eval_interval,
        final_eval_batches=max(1, FINAL_EVAL_TOKENS // (config.batch_size * block_size)),
        checkpoints=Checkpoints(out_dir_of(config), config.keep_checkpoints, weight_files),
        state=state,
        ranks=ranks,
        device=device,
        dtype=dtype,
        sinks=sinks,
        flops_per_token=model.config.replace(block_size=block_size).flops_per_token,
    )
    return Prepared(job, train.num_tokens, val.num_tokens, checkpoint=checkpoint)


def model_files(shape: DecoderConfig, tokenizer: Tokenizer | None, base: Path | None = None) -> WeightFiles:
    """A decoder and its tokenizer as a model folder; of the model that it began as it keeps what else is there."""

    def write(tensors: dict[str, Tensor], folder: Path, pause: Pause) -> None:
        write_model(shape, tensors, folder, pause=pause)
        if tokenizer is not None:
            tokenizer.save(folder)
        if base is not None:
            keep_companions(base, folder)

    return WeightFiles(write, lambda folder: from_hf_tensors(shape, read_tensors(folder, shape)))


def keep_companions(base: Path, folder: Path) -> None:
    """Copy what else came with a model's tokenizer, such as its chat template."""
    for name in TOKENIZER_FILES:
        if (base / name).is_file() and not (folder / name).exists():
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(base / name, folder / name)


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
