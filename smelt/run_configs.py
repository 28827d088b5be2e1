"""Configs of runs, a class for each recipe: one schema for flags, YAML, JSON and requests.

Knows no torch, and opens no file but the config of a run that is to go on.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from smelt.configs import (
    PRESETS,
    RUN_CONFIG,
    Config,
    DecoderConfig,
    Dtype,
    PositiveInt,
    read_config_file,
    validated,
)
from smelt.errors import ConfigError, NotFound


class RunConfig(Config):
    """What runs of every recipe share. A recipe's own class adds fields and narrows defaults."""

    recipe: str = Field(description="what is done with data and model: a key of RECIPE_CONFIGS")
    init_from: str = Field(description="where the weights come from; resume: the last checkpoint in out-dir")

    # Steps
    max_iters: int | None = Field(None, ge=0, description="optimizer steps")
    max_time: float | None = Field(None, gt=0, description="stop after this many seconds of training")
    batch_size: PositiveInt = Field(16, description="rows in one forward pass")
    gradient_accumulation_steps: PositiveInt = Field(1, description="forward passes before one optimizer step")
    seed: int = Field(1337, ge=0, lt=2**32, description="fixes initial weights, data order and dropout")

    # Optimizer
    learning_rate: float | None = Field(None, ge=0, description="peak learning rate of AdamW")
    min_lr: float | None = Field(None, ge=0, description="learning rate at the end of the decay (a tenth of the peak)")
    warmup_iters: int | None = Field(None, ge=0, description="steps of linear warm-up (5% of all, 100 at most)")
    lr_decay_iters: int | None = Field(None, ge=0, description="step at which the decay ends (the last)")
    decay_lr: bool = Field(True, description="cosine decay to min-lr; false keeps the peak after warm-up")
    weight_decay: float = Field(0.1, ge=0, description="decoupled decay of matrices; vectors never decay")
    betas: tuple[float, float] = Field((0.9, 0.95), description="AdamW's averaging rates, as 0.9,0.95")
    grad_clip: float = Field(1.0, ge=0, description="largest global gradient norm; 0 turns clipping off")

    # Evaluation, logging and checkpoints
    out_dir: str | None = Field(None, description="where checkpoints and metrics go (out, or out-MODEL from a model)")
    resume_if_begun: bool = Field(False, description="go on where out-dir holds a checkpoint: for torchrun and SLURM")
    eval_interval: PositiveInt | None = Field(None, description="steps between evaluations")
    eval_iters: PositiveInt = Field(20, description="validation batches per evaluation while training")
    eval_only: bool = Field(False, description="evaluate the model on the whole validation split and stop")
    log_interval: PositiveInt = Field(10, description="steps between lines of metrics")
    always_save_checkpoint: bool = Field(True, description="save at every evaluation; false: only when it is the best")
    keep_checkpoints: PositiveInt = Field(2, description="how many checkpoints to keep besides the best")
    wandb: bool = Field(False, description="also log to Weights & Biases (pip install 'smelt[wandb]')")
    tensorboard: bool = Field(False, description="also log to TensorBoard (pip install 'smelt[tensorboard]')")

    # Device
    device: str = Field("auto", description="auto, cpu, cuda, cuda:N or mps")
    dtype: Dtype = Field("auto", description="auto picks the fastest that is safe on the device")
    ranks: PositiveInt = Field(1, description="processes on this machine that train together, one per GPU")
    sharding: Literal["none", "optimizer", "full"] = Field(
        "none", description="what each rank holds only its part of: none, the optimizer, or full: weights too"
    )
    threads: PositiveInt | None = Field(None, description="CPU threads of all ranks together (the machine's cores)")
    compile: Literal["auto", "true", "false"] = Field("auto", description="torch.compile; auto: when the run repays it")
    gradient_checkpointing: bool = Field(False, description="recompute activations in backward to save memory")

    @field_validator("betas", mode="before")
    @classmethod
    def _split_betas(cls, value: Any) -> Any:
        return value.split(",") if isinstance(value, str) else value

    @field_validator("compile", mode="before")
    @classmethod
    def _lower_compile(cls, value: Any) -> Any:
        return str(value).lower()

    @field_validator("betas")
    @classmethod
    def _averaging_betas(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in value):
            raise ValueError(f"betas {value} must each lie in [0, 1)")
        return value

    @model_validator(mode="after")
    def _sharded_or_compiled(self) -> Self:
        if self.sharding != "none" and self.compile == "true":
            raise ValueError(f"sharding {self.sharding} cannot be compiled: give compile=false, or sharding=none")
        return self

    @property
    def base_model(self) -> str | None:
        """The model that the run begins with, as its owner calls it; None from scratch, or where only a run knows."""
        return None if self.init_from in ("scratch", "resume") else self.init_from

    @property
    def path_fields(self) -> tuple[str, ...]:
        """Fields whose value may be a path, which means something else in another folder."""
        return ("init_from",)


class TrainConfig(RunConfig):
    """Pretraining, or more of it. Every field is a flag of `smelt train` and a key of its YAML or JSON file."""

    recipe: Literal["pretrain"] = Field("pretrain", description="train on running text")

    # Data
    data_path: str | None = Field(None, description="file, folder, URL, hf:ORG/NAME or builtin:pydoc to train on")
    dataset: str | None = Field(None, description="name of a dataset made by `smelt data add`")
    tokenizer: str | None = Field(
        None, description="bytes, char, bpe:N, gpt2 or a folder; the dataset's or model's own, else bpe:4096"
    )
    train_val_split: float = Field(0.1, gt=0, lt=1, description="fraction of the documents kept for validation")

    # Model
    init_from: str = Field("scratch", description="scratch, resume, a model's folder or name, or gpt2...gpt2-xl")
    preset: str | None = Field(None, description=f"shape by name: {', '.join(PRESETS)}")
    block_size: PositiveInt | None = Field(None, description="context length in tokens (128, or the preset's)")
    n_layer: PositiveInt | None = Field(None, description="number of blocks (4, or the preset's)")
    n_head: PositiveInt | None = Field(None, description="number of attention heads (4, or the preset's)")
    n_embd: PositiveInt | None = Field(None, description="width of the model (128, or the preset's)")
    dropout: float = Field(0.0, ge=0, lt=1, description="fraction of activations dropped while training")
    bias: bool = Field(True, description="biases in linear layers and LayerNorm (GPT-2 family)")

    # Steps, optimizer and evaluation
    max_iters: int = Field(2000, ge=0, description="optimizer steps")
    batch_size: PositiveInt = Field(16, description="rows of block-size tokens in one forward pass")
    learning_rate: float = Field(1e-3, ge=0, description="peak learning rate of AdamW")
    eval_interval: PositiveInt = Field(250, description="steps between evaluations")

    @model_validator(mode="before")
    @classmethod
    def _flatten_model_section(cls, values: Any) -> Any:
        """Shape keys may stand in a `model:` section, as the second replaced system writes them."""
        if isinstance(values, dict) and isinstance(values.get("model"), dict):
            return {**{k: v for k, v in values.items() if k != "model"}, **values["model"]}
        return values

    @field_validator("preset")
    @classmethod
    def _known_preset(cls, value: str | None) -> str | None:
        if value is not None and value not in PRESETS:
            raise ValueError(f"unknown preset {value!r}; known: {', '.join(PRESETS)}")
        return value

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.data_path is not None and self.dataset is not None:
            raise ValueError("data_path and dataset exclude each other: give one of them")
        return self

    @property
    def path_fields(self) -> tuple[str, ...]:
        """Fields whose value may be a path, which means something else in another folder."""
        return ("data_path", "tokenizer", "init_from")

    def decoder_config(self, vocab_size: int) -> DecoderConfig:
        """The shape that the preset and the single flags ask for; single flags win."""
        shape: dict[str, Any] = {"block_size": 128, "bias": self.bias, "qkv_bias": self.bias}
        shape |= PRESETS[self.preset or "nano"]
        for name in ("block_size", "n_layer", "n_head", "n_embd"):
            if getattr(self, name) is not None:
                shape[name] = getattr(self, name)
        return validated(DecoderConfig, {**shape, "vocab_size": vocab_size})


NEW_RANK = 16  # of an adapter, where nobody says another


class FineTuneConfig(RunConfig):
    """More training of a model, on conversations or texts. Every field is a flag of `smelt finetune`."""

    recipe: Literal["fine-tune"] = Field("fine-tune", description="train on examples of what to answer")
    init_from: Literal["model", "resume"] = Field("model", description="model, or resume: go on in out-dir")

    # Data
    data: str = Field(description="conversations, prompts or texts: a file, mostly of JSON lines, or a dataset's name")
    valid_data: str | None = Field(None, description="examples to validate on, given likewise")
    train_val_split: float = Field(0.1, ge=0, lt=1, description="fraction kept for validation, without valid-data")
    max_length: PositiveInt | None = Field(None, description="tokens of an example at most (the model's context)")

    # Model
    model: str = Field(description="what to fine-tune: a model's name or folder, a run's out-dir, hf:ORG/NAME")
    method: Literal["supervised", "dpo"] = Field("supervised", description="dpo learns from pairs of answers")
    beta: float = Field(0.1, gt=0, description="dpo: how much it costs to leave the model it began with")
    lora: bool = Field(True, description="train an adapter that is kept apart; false: all weights")
    lora_rank: Annotated[int, Field(ge=1, le=1024)] | None = Field(
        None, description=f"rank of the adapter ({NEW_RANK}; that of an adapter to go on from)"
    )
    lora_alpha: float | None = Field(None, gt=0, description="scales what is added, by alpha / rank (twice the rank)")
    lora_targets: str | None = Field(
        None, description="all, attention, mlp, or modules as in PEFT: q_proj,v_proj (all; those of an adapter)"
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="fraction of activations dropped while training")

    # Steps, optimizer and evaluation
    epochs: PositiveInt = Field(3, description="how often each example is seen")
    max_iters: int | None = Field(None, ge=0, description="optimizer steps, in place of epochs")
    batch_size: PositiveInt = Field(8, description="examples in one forward pass")
    learning_rate: float | None = Field(
        None, ge=0, description="peak learning rate (2e-4, without lora 2e-5; a tenth of it for dpo)"
    )
    learning_rate_multiplier: float = Field(1.0, gt=0, description="times the peak learning rate")
    weight_decay: float = Field(0.0, ge=0, description="decoupled decay of matrices; vectors never decay")
    eval_interval: PositiveInt | None = Field(None, description="steps between evaluations (an epoch's)")
    log_interval: PositiveInt = Field(1, description="steps between lines of metrics")

    @property
    def base_model(self) -> str:
        """The model that the run begins with."""
        return self.model

    @property
    def path_fields(self) -> tuple[str, ...]:
        """Fields whose value may be a path, which means something else in another folder."""
        return ("data", "valid_data", "model")

    @property
    def peak_learning_rate(self) -> float:
        """What `learning_rate` and its multiplier come to."""
        usual = (2e-4 if self.lora else 2e-5) / (10 if self.method == "dpo" else 1)
        return (usual if self.learning_rate is None else self.learning_rate) * self.learning_rate_multiplier


# What suits a model that begins with random vectors: docs/experiments.md.
FROM_SCRATCH: dict[str, Any] = {
    "epochs": 10,
    "learning_rate": 5e-3,
    "weight_decay": 0.3,
    "dropout": 0.3,
    "label_smoothing": 0.1,
    "betas": (0.9, 0.98),
}


class ClassifierConfig(RunConfig):
    """A text classifier, from labelled texts. Every field is a flag of `smelt train-classifier`."""

    recipe: Literal["classify"] = Field("classify", description="train on texts with labels")
    init_from: Literal["model", "resume"] = Field("model", description="model, or resume: go on in out-dir")

    # Data
    data: str = Field(description="labelled texts: .csv, .tsv, .jsonl, .parquet, a folder of them, URL or hf:ORG/NAME")
    valid: str | None = Field(None, description="labelled texts to validate on, given likewise")
    train_val_split: float = Field(0.1, gt=0, lt=1, description="fraction kept for validation, without --valid")
    text_column: str | None = Field(None, description="column of the texts (found by its usual names)")
    label_column: str | None = Field(None, description="column of the labels (found by its usual names)")
    errors: Literal["strict", "skip"] = Field("strict", description="what to do with records that are no labelled text")
    num_samples: PositiveInt | None = Field(None, description="train on so many texts, drawn by the seed")
    max_length: Annotated[int, Field(ge=2)] = Field(128, description="tokens of a text at most; its end is left out")

    # Model
    model: str = Field(
        "scratch", description="scratch, or an encoder or decoder to start from: a name, a folder, hf:ORG/NAME"
    )
    tokenizer: str = Field("bpe:8192", description="scratch: bytes, bpe:N (learned here) or a folder")
    n_embd: PositiveInt = Field(32, description="scratch: width of a text's vector")
    num_buckets: Annotated[int, Field(ge=0, le=1 << 24)] = Field(
        200_000, description="scratch: rows that pairs of neighbouring tokens share; 0 looks at single tokens"
    )
    dropout: float = Field(0.1, ge=0, lt=1, description="fraction of activations dropped while training (scratch: 0.3)")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="share of each label given to all (scratch: 0.1)")

    # Steps, optimizer and evaluation
    epochs: PositiveInt = Field(3, description="how often each text is seen (scratch: 10)")
    max_iters: int | None = Field(None, ge=0, description="optimizer steps, in place of epochs")
    batch_size: PositiveInt = Field(32, description="texts in one forward pass")
    learning_rate: float = Field(2e-5, ge=0, description="peak learning rate of AdamW (scratch: 5e-3)")
    min_lr: float | None = Field(None, ge=0, description="learning rate at the end of the decay (0)")
    decay_lr: bool = Field(True, description="linear decay to min-lr; false keeps the peak after warm-up")
    weight_decay: float = Field(0.01, ge=0, description="decoupled decay of matrices (scratch: 0.3)")
    betas: tuple[float, float] = Field((0.9, 0.999), description="AdamW's averaging rates (scratch: 0.9,0.98)")
    eval_interval: PositiveInt | None = Field(None, description="steps between evaluations (an epoch's)")
    patience: PositiveInt | None = Field(None, description="end after so many evaluations without a better one")

    @model_validator(mode="before")
    @classmethod
    def _fill_for_scratch(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("model", "scratch") == "scratch":
            return {**FROM_SCRATCH, **values}
        return values

    @property
    def base_model(self) -> str | None:
        """The model that the run begins with; None from scratch."""
        return None if self.model == "scratch" else self.model

    @property
    def path_fields(self) -> tuple[str, ...]:
        """Fields whose value may be a path, which means something else in another folder."""
        return ("data", "valid", "model", "tokenizer")


# The flags of a run's command under their headings; `recipe` is none, for each command has its own.
Sections = dict[str, tuple[str, ...]]
RUN_SECTIONS: Sections = {
    "Steps": ("max_iters", "max_time", "batch_size", "gradient_accumulation_steps", "seed"),
    "Optimizer": (
        *("learning_rate", "min_lr", "warmup_iters", "lr_decay_iters", "decay_lr"),
        *("weight_decay", "betas", "grad_clip"),
    ),
    "Evaluation, logging and checkpoints": (
        *("out_dir", "resume_if_begun", "eval_interval", "eval_iters", "eval_only", "log_interval"),
        *("always_save_checkpoint", "keep_checkpoints", "wandb", "tensorboard"),
    ),
    "Device": ("device", "dtype", "ranks", "sharding", "threads", "compile", "gradient_checkpointing"),
}
TRAIN_SECTIONS: Sections = {
    "Data": ("data_path", "dataset", "tokenizer", "train_val_split"),
    "Model": ("init_from", "preset", "block_size", "n_layer", "n_head", "n_embd", "dropout", "bias"),
    **RUN_SECTIONS,
}

FINE_TUNE_SECTIONS: Sections = {
    "Data": ("data", "valid_data", "train_val_split", "max_length"),
    "Model": ("init_from", "model", "method", "beta", "lora", "lora_rank", "lora_alpha", "lora_targets", "dropout"),
    **RUN_SECTIONS,
    "Steps": ("epochs", *RUN_SECTIONS["Steps"]),
    "Optimizer": ("learning_rate_multiplier", *RUN_SECTIONS["Optimizer"]),
}

CLASSIFIER_SECTIONS: Sections = {
    "Data": (
        *("data", "valid", "train_val_split", "text_column", "label_column"),
        *("errors", "num_samples", "max_length"),
    ),
    "Model": ("init_from", "model", "tokenizer", "n_embd", "num_buckets", "dropout"),
    **RUN_SECTIONS,
    "Steps": ("epochs", *RUN_SECTIONS["Steps"]),
    "Optimizer": (*RUN_SECTIONS["Optimizer"], "label_smoothing"),
    "Evaluation, logging and checkpoints": ("patience", *RUN_SECTIONS["Evaluation, logging and checkpoints"]),
}

RECIPE_CONFIGS: dict[str, type[RunConfig]] = {
    "pretrain": TrainConfig,
    "fine-tune": FineTuneConfig,
    "classify": ClassifierConfig,
}
RECIPE_SECTIONS: dict[str, Sections] = {
    "pretrain": TRAIN_SECTIONS,
    "fine-tune": FINE_TUNE_SECTIONS,
    "classify": CLASSIFIER_SECTIONS,
}


def config_of(values: dict[str, Any]) -> RunConfig:
    """The config in a mapping, of the class that its key `recipe` names ("pretrain" without one). ConfigError."""
    recipe = values.get("recipe", "pretrain")
    if recipe not in RECIPE_CONFIGS:
        raise ConfigError(f"unknown recipe {recipe!r}; known: {', '.join(RECIPE_CONFIGS)}")
    return validated(RECIPE_CONFIGS[recipe], values)


def resumed_values(values: dict[str, Any]) -> dict[str, Any]:
    """The saved config of the run in `out_dir`, with the given values on top. NotFound where there is no run."""
    saved = Path(values.get("out_dir") or "out") / RUN_CONFIG
    if not saved.is_file():
        raise NotFound(f"nothing to resume: {saved} does not exist; give the run's folder as --out-dir")
    return {**read_config_file(saved), **values}


def out_dir_of(config: RunConfig) -> Path:
    """The run's folder: as given, or `out`, or `out-MODEL` when it starts from a model."""
    if config.out_dir is not None:
        return Path(config.out_dir)
    base = config.base_model
    return Path("out" if base is None else f"out-{Path(base.removeprefix('hf:')).name}")


def newest_checkpoint(out_dir: Path) -> str | None:
    """The name of the last one, which tells how far a run has come."""
    return max((path.name for path in out_dir.glob("checkpoints/step-*")), default=None)


def learning_rates(config: RunConfig, peak: float, num_steps: int) -> tuple[float, float, int, int]:
    """(peak, floor, warm-up steps, step at which decay ends) of a run's schedule, the open ones filled in."""
    floor = peak / 10 if config.min_lr is None else config.min_lr
    warmup = min(100, num_steps // 20) if config.warmup_iters is None else config.warmup_iters
    decay_end = num_steps if config.lr_decay_iters is None else config.lr_decay_iters
    return peak, floor if config.decay_lr else peak, warmup, decay_end
