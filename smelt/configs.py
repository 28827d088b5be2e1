"""The shape of a model and of a training run, as pydantic classes: one schema for flags, YAML and JSON.

Knows no torch and opens no file of the user's except the config file it is asked to read or write.
"""

import json
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from smelt.errors import ConfigError, NotFound

# What a run's folder holds besides checkpoints.
RUN_CONFIG = "config.yaml"
RUN_LOCK = ".lock"  # held by the process that trains in the folder
RUN_METRICS = "metrics.jsonl"
RUN_LOG = "log.txt"

Architecture = Literal["gpt2", "llama", "mistral", "qwen2", "qwen3"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Quantize = Literal["none", "int8"]


class Config(BaseModel):
    """Frozen, and unknown keys are errors: a typo in a file must not be silently ignored."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed, validated again."""
        return type(self).model_validate({**self.model_dump(), **changes})


class RopeScaling(Config):
    """Llama 3's frequency scaling: wavelengths beyond the original context are stretched."""

    factor: float = Field(gt=0, description="how many times longer the context becomes")
    low_freq_factor: float = Field(gt=0, description="fewer turns than this in the old context: stretched whole")
    high_freq_factor: float = Field(gt=0, description="more turns than this in the old context: left alone")
    original_block_size: int = Field(ge=1, description="the context before stretching, in tokens")


class DecoderConfig(Config):
    """Everything that fixes the shape of a decoder, in GPT-2's words."""

    architecture: Architecture = Field("gpt2", description="Hugging Face's model_type")
    vocab_size: int = Field(ge=1, description="number of token ids")
    block_size: int = Field(ge=1, description="longest context in tokens")
    n_layer: int = Field(ge=1, description="number of blocks")
    n_head: int = Field(ge=1, description="number of query heads")
    n_embd: int = Field(ge=1, description="width of the residual stream")
    n_kv_head: int = Field(0, ge=0, description="key/value heads; 0 means as many as n_head")
    head_dim: int = Field(0, ge=0, description="width of one head; 0 means n_embd / n_head")
    n_inner: int = Field(0, ge=0, description="width of the MLP; 0 means 4 x n_embd")
    position: Literal["learned", "rope"] = Field("learned", description="a table of vectors, or rotations")
    norm: Literal["layernorm", "rmsnorm"] = Field("layernorm", description="before each branch, and at the end")
    mlp: Literal["gelu", "gelu_exact", "swiglu"] = Field("gelu", description="gelu is GPT-2's, by tanh")
    bias: bool = Field(True, description="biases in every linear layer and LayerNorm")
    qkv_bias: bool = Field(True, description="biases in the query, key and value projections")
    qk_norm: bool = Field(False, description="RMSNorm over each query and key head (Qwen3)")
    tied: bool = Field(True, description="the output head shares the token embedding")
    norm_eps: float = Field(1e-5, gt=0, description="added to the variance")
    rope_theta: float = Field(10000.0, gt=0, description="base of the rotary wavelengths")
    rope_scaling: RopeScaling | None = Field(None, description="Llama 3's, or none")
    sliding_window: int | None = Field(None, ge=1, description="attend to this many tokens at most")

    @model_validator(mode="before")
    @classmethod
    def _fill_derived(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        filled = dict(values)
        heads, width = filled.get("n_head"), filled.get("n_embd")
        if isinstance(heads, int) and isinstance(width, int) and heads > 0:
            filled["n_kv_head"] = filled.get("n_kv_head") or heads
            filled["head_dim"] = filled.get("head_dim") or max(1, width // heads)
            filled["n_inner"] = filled.get("n_inner") or 4 * width
        return filled

    @model_validator(mode="after")
    def _check_heads(self) -> Self:
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head {self.n_head} is not a multiple of n_kv_head {self.n_kv_head}")
        if self.architecture == "gpt2" and self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}")
        if self.position == "rope" and self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} must be even for rotary positions")
        return self

    @property
    def num_parameters(self) -> int:
        """Parameters by formula, so that nothing needs to be allocated to know a model's size."""
        qkv = (self.n_head + 2 * self.n_kv_head) * self.head_dim
        attention = self.n_embd * (qkv + self.n_head * self.head_dim)
        mlp = (3 if self.mlp == "swiglu" else 2) * self.n_embd * self.n_inner
        norm = self.n_embd * (2 if self.norm == "layernorm" and self.bias else 1)
        vectors = 2 * norm + (2 * self.head_dim if self.qk_norm else 0)
        vectors += qkv if self.qkv_bias else 0
        vectors += 2 * self.n_embd + (2 if self.mlp == "swiglu" else 1) * self.n_inner if self.bias else 0
        tables = self.vocab_size * self.n_embd * (1 if self.tied else 2)
        tables += self.block_size * self.n_embd if self.position == "learned" else 0
        return self.n_layer * (attention + mlp + vectors) + tables + norm

    @property
    def flops_per_token(self) -> int:
        """Floating-point operations of one forward and backward pass per token at full context.

        6 per matmul parameter and 12 x layers x width x context for attention (PaLM, appendix B).
        """
        positions = self.block_size * self.n_embd if self.position == "learned" else 0
        lookups = 0 if self.tied else self.vocab_size * self.n_embd
        attention = 12 * self.n_layer * self.n_head * self.head_dim * self.block_size
        return 6 * (self.num_parameters - positions - lookups) + attention


LLAMA_STYLE: dict[str, Any] = {
    "architecture": "llama",
    "position": "rope",
    "norm": "rmsnorm",
    "mlp": "swiglu",
    "bias": False,
    "qkv_bias": False,
}

# Shapes by name. A preset leaves vocab_size to the tokenizer and may leave block_size to the run.
PRESETS: dict[str, dict[str, Any]] = {
    "nano": {"n_layer": 4, "n_head": 4, "n_embd": 128},
    "micro": {"n_layer": 6, "n_head": 6, "n_embd": 384},
    "gpt2": {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024},
    "gpt2-medium": {"n_layer": 24, "n_head": 16, "n_embd": 1024, "block_size": 1024},
    "gpt2-large": {"n_layer": 36, "n_head": 20, "n_embd": 1280, "block_size": 1024},
    "gpt2-xl": {"n_layer": 48, "n_head": 25, "n_embd": 1600, "block_size": 1024},
    "nano-llama": {**LLAMA_STYLE, "n_layer": 4, "n_head": 4, "n_embd": 128, "n_inner": 352},
    "smollm2-135m": {
        **LLAMA_STYLE,
        "n_layer": 30,
        "n_head": 9,
        "n_kv_head": 3,
        "n_embd": 576,
        "n_inner": 1536,
        "block_size": 2048,
        "rope_theta": 100000.0,
    },
}

PositiveInt = Annotated[int, Field(ge=1)]
C = TypeVar("C", bound=Config)


class TrainConfig(Config):
    """A training run. Every field is a flag of `smelt train` and a key of its YAML or JSON file."""

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

    # Steps
    max_iters: int = Field(2000, ge=0, description="optimizer steps")
    max_time: float | None = Field(None, gt=0, description="stop after this many seconds of training")
    batch_size: PositiveInt = Field(16, description="rows of block-size tokens in one forward pass")
    gradient_accumulation_steps: PositiveInt = Field(1, description="forward passes before one optimizer step")
    seed: int = Field(1337, ge=0, lt=2**32, description="fixes initial weights, data order and dropout")

    # Optimizer
    learning_rate: float = Field(1e-3, ge=0, description="peak learning rate of AdamW")
    min_lr: float | None = Field(None, ge=0, description="learning rate at the end of the decay (a tenth of the peak)")
    warmup_iters: int | None = Field(None, ge=0, description="steps of linear warm-up (5% of max-iters, 100 at most)")
    lr_decay_iters: int | None = Field(None, ge=0, description="step at which the decay ends (max-iters)")
    decay_lr: bool = Field(True, description="cosine decay to min-lr; false keeps the peak after warm-up")
    weight_decay: float = Field(0.1, ge=0, description="decoupled decay of matrices; vectors never decay")
    betas: tuple[float, float] = Field((0.9, 0.95), description="AdamW's averaging rates, as 0.9,0.95")
    grad_clip: float = Field(1.0, ge=0, description="largest global gradient norm; 0 turns clipping off")

    # Evaluation, logging and checkpoints
    out_dir: str | None = Field(None, description="where checkpoints and metrics go (out, or out-MODEL from a model)")
    eval_interval: PositiveInt = Field(250, description="steps between evaluations")
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
    threads: PositiveInt | None = Field(None, description="CPU threads (all the machine's cores)")
    compile: Literal["auto", "true", "false"] = Field("auto", description="torch.compile; auto: when the run repays it")
    gradient_checkpointing: bool = Field(False, description="recompute activations in backward to save memory")

    @model_validator(mode="before")
    @classmethod
    def _flatten_model_section(cls, values: Any) -> Any:
        """Shape keys may stand in a `model:` section, as the second replaced system writes them."""
        if isinstance(values, dict) and isinstance(values.get("model"), dict):
            return {**{k: v for k, v in values.items() if k != "model"}, **values["model"]}
        return values

    @field_validator("betas", mode="before")
    @classmethod
    def _split_betas(cls, value: Any) -> Any:
        return value.split(",") if isinstance(value, str) else value

    @field_validator("compile", mode="before")
    @classmethod
    def _lower_compile(cls, value: Any) -> Any:
        return str(value).lower()

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
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas {self.betas} must each lie in [0, 1)")
        return self

    def decoder_config(self, vocab_size: int) -> DecoderConfig:
        """The shape that the preset and the single flags ask for; single flags win."""
        shape: dict[str, Any] = {"block_size": 128, "bias": self.bias, "qkv_bias": self.bias}
        shape |= PRESETS[self.preset or "nano"]
        for name in ("block_size", "n_layer", "n_head", "n_embd"):
            if getattr(self, name) is not None:
                shape[name] = getattr(self, name)
        return validated(DecoderConfig, {**shape, "vocab_size": vocab_size})

    def learning_rate_schedule(self) -> tuple[float, float, int, int]:
        """(peak, floor, warm-up steps, step at which decay ends), the open ones filled in."""
        floor = self.learning_rate / 10 if self.min_lr is None else self.min_lr
        warmup = min(100, self.max_iters // 20) if self.warmup_iters is None else self.warmup_iters
        decay_end = self.max_iters if self.lr_decay_iters is None else self.lr_decay_iters
        return self.learning_rate, floor, warmup, decay_end


# Headings of the flags' help: the first field of each section.
TRAIN_SECTIONS = {
    "data_path": "Data",
    "init_from": "Model",
    "max_iters": "Steps",
    "learning_rate": "Optimizer",
    "out_dir": "Evaluation, logging and checkpoints",
    "device": "Device",
}


def validated(config_class: type[C], values: dict[str, Any]) -> C:
    """Build a config, turning pydantic's report into one ConfigError with a line per bad field."""
    try:
        return config_class.model_validate(values)
    except ValidationError as report:
        raise ConfigError(explained(report, config_class)) from None


def explained(report: ValidationError, config_class: type[BaseModel]) -> str:
    """Pydantic's report in our words, a line per bad field."""
    return "\n".join(_explain(error, config_class) for error in report.errors())


def _explain(error: Any, config_class: type[BaseModel]) -> str:
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"unknown key {where!r}; known keys: {', '.join(sorted(config_class.model_fields))}"
    message = error["msg"].removeprefix("Value error, ")
    return f"{where}: {message} (got {error['input']!r})" if where else message


def flag_text(value: Any) -> str:
    """A field's value as one would type it after its flag."""
    if isinstance(value, tuple | list):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def read_config_file(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML or JSON file; dashes in keys count as underscores."""
    path = Path(path)
    if not path.is_file():
        raise NotFound(f"config file {path} does not exist")
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"config file {path} is not valid {path.suffix.lstrip('.') or 'YAML'}: {error}") from None
    if not isinstance(values, dict | None):
        raise ConfigError(f"config file {path} must hold a mapping of keys to values, not {type(values).__name__}")
    return {str(key).replace("-", "_"): value for key, value in (values or {}).items()}


def write_config_file(config: Config, path: Path) -> None:
    """Write every field as YAML, in the order of the class."""
    path.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False), encoding="utf-8")
