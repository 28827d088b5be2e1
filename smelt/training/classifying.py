"""Text classifiers: from scratch, from an encoder or a decoder, or from where a run stopped, on labelled texts.

Knows which data, tokenizer and weights a config means; what all recipes share is in `run_setup`.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smelt.configs import validated
from smelt.data.documents import Reading
from smelt.data.labelled import Columns, LabelledTexts, read_labelled
from smelt.data.sources import Progress
from smelt.data.tokenizers import Tokenizer, make_tokenizer
from smelt.errors import ConfigError, TokenizerError
from smelt.models.batch import Batch
from smelt.models.classifier import Classifier, labels_of
from smelt.models.classifier_folders import (
    assemble_classifier,
    read_classifier_state,
    write_classifier,
)
from smelt.models.devices import pick_dtype
from smelt.models.encoder_architectures import ClassifierShape, NgramConfig
from smelt.models.folders import read_classifier_shape, read_tokenizer
from smelt.models.loading import text_ids
from smelt.models.ngram_encoder import NgramEncoder
from smelt.models.registry import resolve
from smelt.models.tensor_file import Pause
from smelt.run_configs import ClassifierConfig, learning_rates, out_dir_of
from smelt.training.checkpoint import Checkpoints, WeightFiles, latest, restore
from smelt.training.job import Evaluation, Job, reducible
from smelt.training.label_scores import SCORES_FILE, LabelScores, confusions, read_scores, write_scores
from smelt.training.losses import Loss, Metrics
from smelt.training.metrics import Note, RunSummary, Sink
from smelt.training.optim import Optimizer, linear_with_warmup
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
from smelt.training.text_batches import TextBatches, eval_batches

NGRAM_BLOCK = 4096  # tokens: a mean has no longest text, but work has to have bounds


@dataclass(frozen=True, slots=True)
class Start:
    """What a run begins with. Without a shape it begins from scratch."""

    shape: ClassifierShape | None = None
    weights: dict[str, Tensor] | None = None
    tokenizer: Tokenizer | None = None
    checkpoint: Path | None = None  # to resume from


@dataclass(frozen=True, slots=True)
class Texts:
    """Labelled texts and their tokens."""

    source: LabelledTexts
    ids: list[list[int]]

    @property
    def num_tokens(self) -> int:
        """Of all texts."""
        return sum(map(len, self.ids))


def classify(
    config: ClassifierConfig,
    _datasets_folder: Path,
    models_folder: Path,
    sinks: Sequence[Sink] = (),
    progress: Progress = no_progress,
    started: Started = unnoticed,
) -> RunSummary:
    """Train a text classifier as `config` says.

    `progress` hears of what is downloaded; `started`, on the first rank, that the run's folder is now its own. Raises
    DataError, ConfigError, NotFound, NotEnoughData and what `run_prepared` raises.
    """

    def prepare(config: ClassifierConfig, ranks: Ranks, device: torch.device) -> Prepared:
        start = read_start(config, models_folder)
        data = read_data(config, start, progress)
        return prepare_job(config, start, data, ranks, device)

    return run_prepared(config, prepare, sinks, started)


def read_start(config: ClassifierConfig, models_folder: Path) -> Start:
    """The shape, weights and tokenizer that the run begins with."""
    if config.init_from == "resume":
        checkpoint = latest(out_dir_of(config))
        return _read_start(checkpoint, checkpoint)
    if config.model == "scratch":
        return Start()
    path = resolve(config.model, models_folder)
    if path.is_file():
        raise ConfigError(f"{path} is nanoGPT's; import it first: smelt models import {path} NAME")
    return _read_start(path, None)


def _read_start(folder: Path, checkpoint: Path | None) -> Start:
    shape, tokenizer = read_classifier_shape(folder), read_tokenizer(folder)
    if tokenizer is None:
        raise TokenizerError(f"{folder} has no tokenizer; put its tokenizer.json beside the weights")
    return Start(shape, read_classifier_state(folder, shape), tokenizer, checkpoint)


def read_data(config: ClassifierConfig, start: Start, progress: Progress) -> tuple[LabelledTexts, LabelledTexts]:
    """The texts to train on and those to validate on, by the same labels."""
    columns = Columns(config.text_column or "", config.label_column or "")

    def read(spec: str, names: Sequence[str] | None) -> LabelledTexts:
        return read_labelled(spec, columns, names, Reading(config.errors), progress)

    train = read(config.data, start.shape.labels if start.checkpoint and start.shape else None)
    if start.shape is not None and set(train.names) <= set(start.shape.labels):
        train = train.renumbered(start.shape.labels)
    if config.valid is not None:
        valid = read(config.valid, train.names)
    else:
        train, valid = train.split(config.train_val_split, config.seed)
    if config.num_samples is not None:
        train = train.sample(config.num_samples, config.seed)
        valid = valid.sample(max(1, config.num_samples // 4), config.seed)
    return train, valid


def prepare_job(
    config: ClassifierConfig,
    start: Start,
    data: tuple[LabelledTexts, LabelledTexts],
    ranks: Ranks,
    device: torch.device,
) -> Prepared:
    """Put together what the loop needs."""
    tokenizer = start.tokenizer or make_tokenizer(config.tokenizer, lambda: (f" {t.lower()}" for t in data[0].texts))
    shape = shape_of(config, start, data[0].names, tokenizer)
    encoder = text_ids(shape, tokenizer, config.max_length)
    train, valid = (Texts(part, encoder.encode(part.texts)) for part in data)
    model = build_model(config, start, shape, train.ids)
    dtype = torch.float32 if is_ngrams(shape) and config.dtype == "auto" else pick_dtype(config.dtype, device)
    fixed = {name: p.detach() for name, p in model.named_parameters() if not p.requires_grad}
    optimizer = optimizer_of(config, model, dtype, device, ranks)
    files = classifier_files(shape, tokenizer, fixed)
    resumed = restore(start.checkpoint, files, optimizer) if start.checkpoint else None
    num_texts = config.batch_size * config.gradient_accumulation_steps
    batches = TextBatches(train.ids, train.source.labels, ranks, num_texts, config.batch_size, config.seed)
    num_steps = config.epochs * batches.steps_per_epoch if config.max_iters is None else config.max_iters
    peak, floor, warmup, decay_end = learning_rates(
        config.replace(min_lr=config.min_lr or 0.0), config.learning_rate, num_steps
    )
    out_dir = out_dir_of(config)
    job = Job(
        config=config,
        num_steps=num_steps,
        eval_interval=config.eval_interval or batches.steps_per_epoch,
        learning_rate=lambda step: linear_with_warmup(step, peak, floor, warmup, decay_end),
        model=model.train(),
        has_dropout=config.dropout > 0,
        optimizer=optimizer,
        loss=label_loss(config.label_smoothing),
        train_batches=batches,
        evaluate=evaluation_of(config, model, optimizer, valid, ranks, device),
        final_eval_batches=None,
        checkpoints=Checkpoints(out_dir, config.keep_checkpoints, files),
        state=initial_state(config, dataset_of(config, *data), dtype, ranks, False, resumed),
        ranks=ranks,
        device=device,
        dtype=dtype,
        sinks=[],
        patience=config.patience,
        figures=("accuracy",),
    )
    notes = tuple(Note(text) for text in (classes_told(train.source, "train"), classes_told(valid.source, "valid")))
    return Prepared(job, train.num_tokens, valid.num_tokens, len(train.ids), start.checkpoint, notes)


def is_ngrams(shape: ClassifierShape) -> bool:
    """Whether a shape is of our own encoder, which is trained in fp32: there are no products to speed up."""
    return isinstance(shape.backbone, NgramConfig)


def shape_of(config: ClassifierConfig, start: Start, labels: tuple[str, ...], tokenizer: Tokenizer) -> ClassifierShape:
    """The shape that is trained, with the labels of the data."""
    if start.shape is None:
        sizes = {"vocab_size": tokenizer.vocab_size, "num_buckets": config.num_buckets, "n_embd": config.n_embd}
        backbone = validated(NgramConfig, {**sizes, "block_size": max(NGRAM_BLOCK, config.max_length)})
        return ClassifierShape(backbone=backbone, labels=labels)
    if config.max_length > start.shape.block_size:
        raise ConfigError(
            f"max_length {config.max_length} is longer than the model's {start.shape.block_size} tokens; lower it"
        )
    if tokenizer.vocab_size > start.shape.backbone.vocab_size:
        raise ConfigError(
            f"the tokenizer of {config.model} has {tokenizer.vocab_size} ids, but the model knows only "
            f"{start.shape.backbone.vocab_size}"
        )
    return start.shape.replace(labels=labels)


def build_model(
    config: ClassifierConfig, start: Start, shape: ClassifierShape, texts: Sequence[Sequence[int]]
) -> Classifier:
    """A fresh model, or the given one with the run's dropout; with a fresh head where the labels are others."""
    if start.shape is None or start.weights is None:
        model = Classifier(shape, config.dropout, config.dropout)
        model.initialize(config.seed)
        if isinstance(model.backbone, NgramEncoder):
            model.backbone.weigh(texts)
        return model
    has_head = start.shape.labels == shape.labels
    weights = start.weights if has_head else {n: t for n, t in start.weights.items() if n.startswith("backbone.")}
    model = assemble_classifier(shape, weights, torch.float32, dropout=config.dropout)
    model.head_dropout = config.dropout
    if not has_head:
        model.initialize_head(config.seed)
    return model


def classifier_files(shape: ClassifierShape, tokenizer: Tokenizer, fixed: dict[str, Tensor]) -> WeightFiles:
    """A classifier with its labels and its tokenizer as a model folder; `fixed` is what no optimizer moves."""

    def write(tensors: dict[str, Tensor], folder: Path, pause: Pause) -> None:
        write_classifier(shape, {**tensors, **fixed}, folder, pause)
        tokenizer.save(folder)

    return WeightFiles(write, lambda folder: read_classifier_state(folder, shape))


def label_loss(smoothing: float) -> Loss:
    """The summed cross-entropy of a batch's labels, and how many have the largest logit."""

    def loss(model: nn.Module, batch: Batch) -> tuple[Tensor, Metrics]:
        logits_BL, labels_B = model(batch).float(), labels_of(batch)
        total = F.cross_entropy(logits_BL, labels_B, reduction="sum", label_smoothing=smoothing)
        return total, {"accuracy": (logits_BL.argmax(dim=-1) == labels_B).sum()}

    return loss


def evaluation_of(
    config: ClassifierConfig, model: Classifier, optimizer: Optimizer, valid: Texts, ranks: Ranks, device: torch.device
) -> Callable[[int | None], Evaluation]:
    """How the loop evaluates: over all texts, once for the same weights, and the best scores are written down."""
    path = out_dir_of(config) / SCORES_FILE
    before = read_scores(path) if config.init_from == "resume" else None
    best_loss = before.loss if before else float("inf")
    known: tuple[int, Evaluation] | None = None

    def evaluate(_max_batches: int | None) -> Evaluation:
        nonlocal best_loss, known
        if known is None or known[0] != optimizer.num_steps:
            scores = score(model, valid, ranks, device, config.batch_size)
            if ranks.is_main and not config.eval_only and scores.loss < best_loss:
                best_loss = scores.loss
                write_scores(scores, path)
            figures = {"accuracy": scores.accuracy, "macro_f1": scores.macro_f1}
            known = optimizer.num_steps, Evaluation(scores.loss, len(valid.ids), figures)
        return known[1]

    return evaluate


@torch.no_grad()
def score(model: Classifier, valid: Texts, ranks: Ranks, device: torch.device, num_texts: int) -> LabelScores:
    """The mean loss and the confusions over all texts, of all ranks, without dropout."""
    names = valid.source.names
    was_training = model.training
    model.eval()
    sums = torch.zeros(1 + len(names) ** 2, dtype=torch.float64)

    def batches_of(rank: int) -> Iterator[Batch]:
        return eval_batches(valid.ids, valid.source.labels, replace(ranks, rank=rank), num_texts, device)

    for batch, counts in ranks.passes(batches_of):
        logits_BL, labels_B = model(batch).float(), labels_of(batch)
        total = F.cross_entropy(logits_BL, labels_B, reduction="sum").double()
        sums += counts * torch.cat((total[None], confusions(logits_BL, labels_B).flatten())).cpu()
    model.train(was_training)
    total_loss, *pairs = ranks.sum_(sums.to(reducible(device))).tolist()
    rows = tuple(tuple(map(int, pairs[i * len(names) : (i + 1) * len(names)])) for i in range(len(names)))
    return LabelScores(names, total_loss / len(valid.ids), rows)


def dataset_of(config: ClassifierConfig, train: LabelledTexts, valid: LabelledTexts) -> tuple[str, str]:
    """Name and sha256 of what the run is trained on and judged by."""
    digest = hashlib.sha256(f"{train.sha256()} {valid.sha256()} {config.max_length}".encode())
    return train.name, digest.hexdigest()


def classes_told(texts: LabelledTexts, split: str) -> str:
    """How many texts of a split have each label."""
    counts = ", ".join(f"{name} {count:,}" for name, count in texts.counts().items())
    skipped = f"; {texts.num_skipped:,} records skipped" if texts.num_skipped else ""
    return f"{split}: {len(texts):,} texts: {counts}{skipped}"
