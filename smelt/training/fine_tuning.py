"""Fine-tuning: a model learns from examples, as a LoRA adapter or with all its weights, supervised or by preferences.

Knows which model and which examples a config means; what all recipes share is in `run_setup`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from math import ceil, isclose
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from smelt.configs import DecoderConfig
from smelt.data.chat_format import ChatFormat
from smelt.data.datasets import dataset_folder, list_datasets, open_dataset
from smelt.data.labelled import order_of
from smelt.data.readers import input_file
from smelt.data.sources import Progress
from smelt.data.tokenizers import Tokenizer
from smelt.data.training_examples import (
    FORMATS,
    Located,
    Sample,
    located_texts,
    read_examples,
    read_texts,
    samples_of,
    wrong_kind,
)
from smelt.errors import ConfigError, NotEnoughData, NotFound, TokenizerError, UnsupportedModel
from smelt.models.adapter_folders import Adapter, read_adapter
from smelt.models.decoder import Decoder
from smelt.models.devices import pick_dtype
from smelt.models.folders import base_of, is_adapter
from smelt.models.loading import load_model
from smelt.models.registry import resolve
from smelt.run_configs import NEW_RANK, FineTuneConfig, learning_rates, out_dir_of
from smelt.training.checkpoint import Checkpoints, WeightFiles, latest, restore
from smelt.training.compiling import compiled
from smelt.training.example_batches import ExampleBatches, ExampleEvaluation, example_batch
from smelt.training.example_losses import answer_logprobs, preference, supervised
from smelt.training.job import Evaluate, Evaluation, Job, evaluate_batches
from smelt.training.lora_factors import (
    LoraFactors,
    chosen_parts,
    fresh_adapter,
    parts_of,
    rank_and_scale,
    trained_matrices,
)
from smelt.training.losses import Loss
from smelt.training.metrics import RunSummary, Sink
from smelt.training.optim import cosine_with_warmup
from smelt.training.parallel import Ranks
from smelt.training.pretraining import model_files
from smelt.training.run_setup import (
    Prepared,
    Started,
    initial_state,
    no_progress,
    optimizer_of,
    run_prepared,
    unnoticed,
)

FIGURES = {"supervised": ("accuracy",), "dpo": ("accuracy", "margin")}


@dataclass(frozen=True, slots=True)
class Base:
    """What is fine-tuned: a model's weights, in fp32, or `adapter`, as it is at first, while the model stays.

    Not on a device yet, which may have no room for it.
    """

    model: Decoder
    tokenizer: Tokenizer
    folder: Path
    adapter: Adapter | None


@dataclass(frozen=True, slots=True)
class Examples:
    """What is learned, and what is validated on; the latter may be nothing."""

    name: str
    train: list[Sample]
    valid: list[Sample]

    @property
    def sha256(self) -> str:
        """Of the tokens that are learned and of what counts in them."""
        digest = sha256()
        for datum in (datum for sample in self.train for datum in sample.data):
            for array in (datum.tokens, datum.inputs["target_tokens"], datum.inputs["weights"]):
                digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()


def fine_tune(
    config: FineTuneConfig,
    datasets_folder: Path,
    models_folder: Path,
    sinks: Sequence[Sink] = (),
    progress: Progress = no_progress,
    started: Started = unnoticed,
) -> RunSummary:
    """Fine-tune a model as `config` says. Raises ConfigError, NotFound, DataError and what `run_prepared` raises."""

    def prepare(config: FineTuneConfig, ranks: Ranks, device: torch.device) -> Prepared:
        base = read_base(config, models_folder, device)
        examples = read_data(config, datasets_folder, base, progress)
        return prepare_job(config, base, examples, ranks, device)

    return run_prepared(config, prepare, sinks, started)


def read_base(config: FineTuneConfig, models_folder: Path, device: torch.device) -> Base:
    """What to begin with; with LoRA the model is in the dtype of its computing, for it will not change."""
    folder = resolve(config.model, models_folder)
    if config.lora and folder.is_file():
        raise ConfigError(
            f"{config.model} is a file of nanoGPT's, and an adapter needs a model's folder to stand on: make one with "
            f"`smelt models export {config.model} FOLDER`, or train all weights with --lora false"
        )
    base = base_of(folder) if config.lora else folder
    dtype = pick_dtype(config.dtype, device) if config.lora else torch.float32
    model, tokenizer = load_model(base, dtype)
    if tokenizer is None:
        raise TokenizerError(f"{folder} has no tokenizer; put its tokenizer.json beside the weights")
    adapter = first_adapter(config, folder, model.config) if config.lora else None
    model = with_dropout(model, config.dropout)
    model.gradient_checkpointing = config.gradient_checkpointing
    return Base(model, tokenizer, base, adapter)


def first_adapter(config: FineTuneConfig, folder: Path, shape: DecoderConfig) -> Adapter:
    """The one in the folder, to go on from; on a model a new one, which changes nothing yet. ConfigError."""
    if is_adapter(folder):
        adapter = read_adapter(folder, shape)
        check_continued(config, adapter, shape)
        return adapter
    rank = config.lora_rank or NEW_RANK
    return fresh_adapter(shape, rank, config.lora_alpha or 2.0 * rank, config.lora_targets or "all", config.seed)


def check_continued(config: FineTuneConfig, adapter: Adapter, shape: DecoderConfig) -> None:
    """ConfigError where an adapter cannot be trained further, or is none of the kind that the config asks for."""
    remedy = f"make one model of both with `smelt models export {config.model} FOLDER`, and train a new adapter of it"
    try:
        rank, scale = rank_and_scale(adapter)
    except UnsupportedModel as error:
        raise ConfigError(f"{config.model} cannot be trained further as an adapter: {error}; {remedy}") from None
    for name, asked, own in (("lora_rank", config.lora_rank, rank), ("lora_alpha", config.lora_alpha, scale * rank)):
        if asked is not None and not isclose(asked, own):
            raise ConfigError(f"{name} {asked:g} is not the {own:g} of {config.model}; leave it out, or {remedy}")
    targets = config.lora_targets
    if targets is not None and chosen_parts(trained_matrices(shape), targets) != parts_of(adapter):
        raise ConfigError(f"lora_targets {targets!r} are not those of {config.model}; leave them out, or {remedy}")


def with_dropout(model: Decoder, dropout: float) -> Decoder:
    """The model again, with dropout where there is any."""
    if not dropout:
        return model
    fresh = Decoder(model.config, dropout).to(model.embedding.weight.dtype)
    fresh.load_state_dict(model.state_dict())
    return fresh


def read_data(config: FineTuneConfig, datasets_folder: Path, base: Base, progress: Progress) -> Examples:
    """The examples in the model's tokens, and those kept for validation. DataError, NotFound, NotEnoughData."""
    shape = base.model.config
    if config.max_length is not None and config.max_length > shape.block_size:
        raise ConfigError(f"--max-length {config.max_length} is more than the model's context of {shape.block_size}")
    chat_format = ChatFormat.of(base_of(base.folder), base.tokenizer)
    max_tokens = config.max_length or shape.block_size

    def samples(spec: str, split: str) -> list[Sample]:
        located = located_examples(spec, split, datasets_folder)
        check_kind(located, config)
        told = with_progress(located, progress, f"tokenizing {Path(spec).name}")
        return samples_of(told, chat_format, base.tokenizer, max_tokens, shape.vocab_size)

    train = samples(config.data, "train")
    if config.valid_data is not None:
        return Examples(Path(config.data).name, train, samples(config.valid_data, "val"))
    num_held = round(config.train_val_split * len(train))
    if num_held == len(train):
        raise NotEnoughData(f"{config.data} holds {len(train)} example(s), all of them kept for validation; add some")
    order = order_of(len(train), config.seed)
    held, learned = sorted(order[:num_held]), sorted(order[num_held:])
    return Examples(Path(config.data).name, [train[n] for n in learned], [train[n] for n in held])


def located_examples(spec: str, split: str, datasets_folder: Path) -> list[Located]:
    """What a dataset or a file holds; a file that is not of JSON lines holds texts.

    A dataset wins over a file of the same name: write ./NAME for the file. NotFound where there is neither; DataError
    where lines are bad.
    """
    known = list_datasets(datasets_folder)
    if spec in known:
        dataset = open_dataset(dataset_folder(datasets_folder, spec))
        return located_texts(dataset.texts("val" if split == "val" else "train"), spec)
    if not (path := Path(spec).expanduser()).is_file():
        raise NotFound(f"there is neither a file nor a dataset {spec!r}; datasets: {', '.join(known) or 'none'}")
    read = read_examples if input_file(path).kind in FORMATS else read_texts
    return read(path, path.name)


def check_kind(located: list[Located], config: FineTuneConfig) -> None:
    """ConfigError where there are preferences and another method, or the other way round."""
    for each in located:
        if (fault := wrong_kind(each.example, config.method)) is not None:
            raise ConfigError(f"{each.where} {fault}")


def with_progress(located: list[Located], progress: Progress, stage: str) -> Iterable[Located]:
    """The examples, while somebody hears how far they are, in characters."""
    sizes = [len(str(each.example)) for each in located]
    num_done, num_total = 0, sum(sizes)
    for each, size in zip(located, sizes, strict=True):
        yield each
        num_done += size
        progress(stage, num_done, num_total)


def prepare_job(config: FineTuneConfig, base: Base, examples: Examples, ranks: Ranks, device: torch.device) -> Prepared:
    """Put together what the loop needs."""
    model, dtype = base.model, pick_dtype(config.dtype, device)
    weight_files = trained_part(base)
    optimizer = optimizer_of(config, model, dtype, device, ranks)
    # Before a checkpoint is restored: preferences are measured against the model that the run began with.
    references = {name: first_logprobs(config, model, samples, device) for name, samples in _splits(examples)}
    checkpoint = latest(out_dir_of(config)) if config.init_from == "resume" else None
    resumed = restore(checkpoint, weight_files, optimizer) if checkpoint else None
    num_rows = min(config.batch_size * config.gradient_accumulation_steps, len(examples.train))
    per_epoch = ceil(len(examples.train) / num_rows)
    num_steps = ceil(config.epochs * len(examples.train) / num_rows) if config.max_iters is None else config.max_iters
    state = initial_state(
        config, (examples.name, examples.sha256), dtype, ranks, compiles=config.compile == "true", resumed=resumed
    )
    rates = learning_rates(config, config.peak_learning_rate, num_steps)
    sinks: list[Sink] = []
    loss = supervised if config.method == "supervised" else partial(preference, beta=config.beta)
    job = Job(
        config=config,
        num_steps=num_steps,
        learning_rate=lambda step: cosine_with_warmup(step, *rates),
        model=model.train(),
        has_dropout=config.dropout > 0,
        optimizer=optimizer,
        loss=compiled(loss, sinks) if state.compiled else loss,
        train_batches=ExampleBatches(
            examples.train, ranks, num_rows, config.batch_size, config.seed, references["train"]
        ),
        evaluate=evaluation(config, model, loss, examples.valid, references["valid"], ranks, device),
        eval_interval=config.eval_interval or per_epoch,
        final_eval_batches=None,
        checkpoints=Checkpoints(out_dir_of(config), config.keep_checkpoints, weight_files),
        state=state,
        ranks=ranks,
        device=device,
        dtype=dtype,
        sinks=sinks,
        flops_per_token=flops_per_token(config, model, examples.train),
        figures=FIGURES[config.method],
    )
    return Prepared(
        job,
        num_train_tokens=sum(sample.num_tokens for sample in examples.train),
        num_val_tokens=sum(sample.num_tokens for sample in examples.valid),
        num_train_samples=len(examples.train),
        checkpoint=checkpoint,
    )


def trained_part(base: Base) -> WeightFiles:
    """Have the model learn what it shall, and say how that is kept."""
    if base.adapter is None:
        return model_files(base.model.config, base.tokenizer, base_of(base.folder))
    return LoraFactors(base.model, base.adapter).files(str(base.folder.absolute()))


def _splits(examples: Examples) -> list[tuple[str, list[Sample]]]:
    return [("train", examples.train), ("valid", examples.valid)]


@torch.no_grad()
def first_logprobs(
    config: FineTuneConfig, model: Decoder, samples: list[Sample], device: torch.device
) -> Tensor | None:
    """log p of the answers of preferences before anything is learned, (number of samples, 2); None without any."""
    if config.method != "dpo" or not samples:
        return None
    model.eval()
    found = torch.zeros(len(samples), 2)
    order = sorted(range(len(samples)), key=lambda number: samples[number].num_tokens)
    for first in range(0, len(order), config.batch_size):
        part = order[first : first + config.batch_size]
        found[part] = answer_logprobs(model, example_batch([samples[n] for n in part], device)).cpu()
    return found


def evaluation(
    config: FineTuneConfig,
    model: Decoder,
    loss: Loss,
    samples: list[Sample],
    references: Tensor | None,
    ranks: Ranks,
    device: torch.device,
) -> Evaluate | None:
    """How the run is evaluated; None where nothing is kept for it."""
    if not samples:
        return None
    held = ExampleEvaluation(samples, ranks, config.batch_size, references)

    def evaluate(max_batches: int | None) -> Evaluation:
        batches_of = partial(held.batches, max_batches, device)
        return evaluate_batches(model, loss, batches_of, ranks, device, FIGURES[config.method])

    return evaluate


def flops_per_token(config: FineTuneConfig, model: Decoder, samples: list[Sample]) -> float:
    """As for pretraining at the mean length; with LoRA without the third that gradients of the weights would take."""
    num_sequences = sum(len(sample.data) for sample in samples)
    length = max(1, sum(sample.num_tokens for sample in samples) // num_sequences)
    return model.config.replace(block_size=length).flops_per_token * (2 / 3 if config.lora else 1)
