"""Bodies and answers of OpenAI's fine-tuning API; knows no job and no run."""

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from smelt.api.openai_lists import Metadata
from smelt.api.openai_parsing import Body, check_neutral, unsupported
from smelt.errors import InvalidInput

# Keys of `smelt finetune` for which OpenAI's API has no word.
CONFIG_KEYS = (
    "lora", "lora_rank", "lora_alpha", "lora_targets", "max_length", "max_iters", "max_time", "learning_rate",
    "min_lr", "warmup_iters", "decay_lr", "weight_decay", "betas", "grad_clip", "dropout", "batch_size",
    "gradient_accumulation_steps", "gradient_checkpointing", "train_val_split", "eval_interval", "eval_iters",
    "log_interval", "keep_checkpoints", "ranks", "sharding",
)  # fmt: skip

Auto = Literal["auto"]


class Hyperparameters(Body):
    """How a job learns; "auto" leaves it to us."""

    n_epochs: int | Auto | None = Field(None, description="how often each example is seen")
    batch_size: int | Auto | None = Field(None, description="examples in one step")
    learning_rate_multiplier: float | Auto | None = Field(None, description="times the usual learning rate")
    beta: float | Auto | None = Field(None, description="dpo: how much it costs to leave the model it began with")

    def values(self) -> dict[str, Any]:
        """Those that are given, as keys of a run's config."""
        check_neutral(self.model_extra, {}, "hyperparameters.")
        given = {name: value for name, value in self.model_dump().items() if value not in (None, "auto")}
        return {"epochs" if name == "n_epochs" else name: value for name, value in given.items()}


class MethodDetails(Body):
    """What belongs to a method."""

    hyperparameters: Hyperparameters | None = None


class Method(Body):
    """How a job learns: from what to answer, or from which of two answers is better."""

    type: str = Field(description="supervised or dpo")
    supervised: MethodDetails | None = None
    dpo: MethodDetails | None = None


class JobBody(Body):
    """A fine-tuning job."""

    model: str = Field(max_length=256, description="name of a registered model, or `default`")
    training_file: str = Field(max_length=64, description="a file that was uploaded with the purpose `fine-tune`")
    validation_file: str | None = Field(None, max_length=64, description="another one, to validate on")
    method: Method | None = Field(None, description="supervised (the default) or dpo, with hyperparameters")
    hyperparameters: Hyperparameters | None = Field(None, description="of the method supervised; `method` has them too")
    suffix: str | None = Field(None, max_length=64, description="a part of the new model's name")
    seed: int | None = Field(None, ge=0, lt=2**32, description="fixes the order of examples and the first weights")
    metadata: Metadata = Field(None, description="up to 16 texts of yours")
    integrations: list[Any] | None = Field(None, description="not supported")
    config: dict[str, Any] | None = Field(
        None, description=f"more keys of `smelt finetune`: {', '.join(CONFIG_KEYS)}; lora: false trains all weights"
    )

    def files(self) -> dict[str, str]:
        """The files by their parameters."""
        given = {"training_file": self.training_file, "validation_file": self.validation_file}
        return {name: value for name, value in given.items() if value is not None}

    def values(self) -> dict[str, Any]:
        """Keys of a run's config. InvalidInput for what we do not have, and what does not go together."""
        check_neutral(self.model_extra, {})
        if self.integrations:
            raise unsupported("integrations")
        config = self.config or {}
        if unknown := sorted(set(config) - set(CONFIG_KEYS)):
            text = f"config.{unknown[0][:60]} is not a key of it; there are: {', '.join(CONFIG_KEYS)}"
            raise InvalidInput(text, f"config.{unknown[0][:60]}")
        values = {"method": self._method(), **self._hyperparameters(), **config}
        if self.validation_file is None:  # everything is learned, unless somebody wants it otherwise
            values = {"train_val_split": 0.0, **values}
        return values if self.seed is None else {**values, "seed": self.seed}

    def _method(self) -> str:
        kind = "supervised" if self.method is None else self.method.type
        if kind not in ("supervised", "dpo"):
            raise InvalidInput(f"method.type {kind[:60]!r} is not supported; use supervised or dpo", "method.type")
        if self.method is not None:
            check_neutral(self.method.model_extra, {}, "method.")
        return kind

    def _hyperparameters(self) -> dict[str, Any]:
        kind = self._method()
        details = getattr(self.method, kind, None)
        values: dict[str, Any] = {} if self.hyperparameters is None else self.hyperparameters.values()
        if details is not None:
            check_neutral(details.model_extra, {}, f"method.{kind}.")
            values |= {} if details.hyperparameters is None else details.hyperparameters.values()
        if "beta" in values and kind != "dpo":
            raise InvalidInput("beta is for the method dpo; leave it out", "hyperparameters.beta")
        return values


@dataclass(frozen=True, slots=True, kw_only=True)
class JobObject:
    """A fine-tuning job, as OpenAI's clients know it. Times are seconds since 1970."""

    id: str
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    created_at: int
    finished_at: int | None
    estimated_finish: int | None
    model: str
    fine_tuned_model: str | None
    organization_id: str
    status: str
    error: dict[str, Any] | None
    training_file: str
    validation_file: str | None
    result_files: list[str]
    trained_tokens: int | None
    seed: int
    hyperparameters: dict[str, Any]
    method: dict[str, Any]
    integrations: list[Any]
    metadata: dict[str, Any] | None
    run_id: str | None  # of ours: what /v1/runs calls it


@dataclass(frozen=True, slots=True, kw_only=True)
class EventObject:
    """Something that happened to a job."""

    id: str
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: str
    message: str
    type: Literal["message", "metrics"]
    data: dict[str, Any] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointObject:
    """A state of the model on the way."""

    id: str
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuned_model_checkpoint: str
    fine_tuning_job_id: str
    step_number: int
    metrics: dict[str, float | None]
