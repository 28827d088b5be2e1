"""Configs: what all pydantic classes of ours share, the shape of a model, and config files to read and write.

Knows no torch, no run (`run_configs` does), and no file of the user's except the config file it is asked for.
"""

import json
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

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
    if error["type"] == "missing" and where in config_class.model_fields:
        return f"{where} is missing: {config_class.model_fields[where].description}"
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
