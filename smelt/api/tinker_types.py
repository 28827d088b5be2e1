"""Bodies of Tinker's clients, and how they are understood; knows no route.

Fields that we do not know are let be: a newer client may send them. A body whose place can be read is never refused
for what else is wrong with it: the operation takes its place and fails there.
"""

from typing import Annotated, Any, TypeVar

import msgspec
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from smelt.api.openai_parsing import parse
from smelt.errors import InvalidInput
from smelt.transport.operations import OptimStep, Sample, Sampler
from smelt.types import SamplingParams

B = TypeVar("B", bound="TinkerBody")
MAX_INT = 2**63 - 1
NO_TOKEN = -1
MAX_TARGETS = 1024  # tokens to score at each place of a prompt


# A user's own words, which we keep and give back.
Metadata = Annotated[dict[str, Any], Field(max_length=256)]


class TinkerBody(BaseModel):
    """Strict JSON, unknown fields aside."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, hide_input_in_errors=True)

    def meant(self, *volatile: str) -> bytes:
        """What is asked for, without fields that may differ when the same is asked again."""
        return self.model_dump_json(exclude=set(volatile)).encode()


class SessionBody(TinkerBody):
    """Begin a session."""

    tags: Annotated[list[str], Field(max_length=256)] = []
    user_metadata: Metadata | None = None
    display_name: Annotated[str | None, Field(max_length=1024)] = None
    project_id: Annotated[str | None, Field(max_length=1024)] = None


class HeartbeatBody(TinkerBody):
    """The client lives."""

    session_id: str


class FinishReason(TinkerBody):
    """How a session went: success, errored or interrupted."""

    type: str


class FinishBody(TinkerBody):
    """End a session."""

    reason: FinishReason
    detail: str | None = None


class ProjectBody(TinkerBody):
    """Whose work a session is."""

    project_id: str = Field(max_length=1024)


class StatusQueryBody(TinkerBody):
    """How sessions shall stand."""

    type: str
    reasons: list[str] | None = None


class CursorBody(TinkerBody):
    """The last session of the page before."""

    last_created_at: Annotated[AwareDatetime, Field(strict=False)]
    last_session_id: str


class SearchBody(TinkerBody):
    """Which sessions are looked for. Whose they are needs no answer: nobody sees those of others."""

    session_id: str | None = None
    project_ids: list[str] | None = None
    user_metadata: dict[str, str] = {}
    display_name: str | None = None
    statuses: list[StatusQueryBody] | None = None
    limit: int = Field(50, ge=1, le=200)
    cursor: CursorBody | None = None


class LoraBody(TinkerBody):
    """Which parts of a model are trained, and how large their adapters are."""

    rank: int
    seed: int | None = None
    train_unembed: bool = True
    train_mlp: bool = True
    train_attn: bool = True


class OptimizerBody(TinkerBody):
    """The optimizer of a model."""

    type: str = "adamw"


class CreateModelBody(TinkerBody):
    """Open a model; without `lora_config` all of it is trained."""

    session_id: str
    model_seq_id: int = Field(ge=0, le=MAX_INT)
    base_model: str
    user_metadata: Metadata | None = None
    lora_config: LoraBody | None = None
    optimizer_config: OptimizerBody = OptimizerBody()


class ModelBody(TinkerBody):
    """Something about a model."""

    model_id: str


class OperationBody(ModelBody):
    """An operation on a model, at its place."""

    seq_id: int | None = Field(None, ge=0, le=MAX_INT)


class OptimStepBody(OperationBody):
    """A step of the optimizer: AdamW's numbers, or those of one that we lack."""

    adam_params: dict[str, Any] | None = None
    optimizer_params: dict[str, Any] | None = None


class AdamBody(TinkerBody):
    """AdamW's numbers."""

    learning_rate: float = Field(1e-4, ge=0)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    eps: float = Field(1e-12, ge=0)
    weight_decay: float = Field(0.0, ge=0)
    grad_clip_norm: float = 0.0


class SaveBody(OperationBody):
    """Save weights."""

    path: str | None = None
    ttl_seconds: int | None = None
    overwrite: bool = False
    user_metadata: Metadata | None = None
    sampling_session_seq_id: int | None = Field(None, ge=0, le=MAX_INT)
    age_encryption_recipients: list[str] | None = None


class LoadBody(TinkerBody):
    """Go on from saved weights: in a model that is there (model_id, seq_id), or in a new one."""

    model_id: str | None = None
    seq_id: int | None = Field(None, ge=0, le=MAX_INT)
    session_id: str | None = None
    model_seq_id: int | None = Field(None, ge=0, le=MAX_INT)
    base_model: str | None = None
    user_metadata: Metadata | None = None
    path: str
    optimizer: bool = False
    optimizer_config: OptimizerBody | None = None


class RetrieveBody(TinkerBody):
    """Ask for what was promised."""

    request_id: str


class SamplingSessionBody(TinkerBody):
    """Open a sampler."""

    session_id: str
    sampling_session_seq_id: int = Field(ge=0, le=MAX_INT)
    base_model: str | None = None
    model_path: str | None = None


class ChunkBody(TinkerBody):
    """A piece of a prompt; only text is supported."""

    type: str = "encoded_text"
    tokens: list[int] = []


class PromptBody(TinkerBody):
    """A prompt, in pieces that are one after the other."""

    chunks: list[ChunkBody]


class SamplingParamsBody(TinkerBody):
    """How to draw."""

    max_tokens: Annotated[int | None, Field(ge=1)] = None
    seed: Annotated[int | None, Field(ge=-MAX_INT, le=MAX_INT)] = None
    stop: str | list[str] | list[int] | None = None
    temperature: Annotated[float, Field(ge=0)] = 1.0
    top_k: Annotated[int, Field(ge=-1)] = -1
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0


class TensorBody(TinkerBody):
    """A tensor, dense or (with the two index lists) as rows of a sparse matrix."""

    data: list[int]
    shape: list[int] | None = None
    sparse_crow_indices: list[int] | None = None
    sparse_col_indices: list[int] | None = None


class SampleBody(TinkerBody):
    """Draw samples."""

    sampling_session_id: str
    seq_id: int | None = Field(None, ge=0, le=MAX_INT)
    num_samples: int = 1
    prompt: PromptBody
    sampling_params: SamplingParamsBody = SamplingParamsBody()
    prompt_logprobs: bool | None = None
    topk_prompt_logprobs: int = Field(0, ge=0, le=1024)
    topk_sample_logprobs: int = Field(0, ge=0, le=1024)
    target_prompt_logprobs: TensorBody | None = None
    prompt_alt_tokens_k: int = Field(0, ge=0, le=1024)
    prompt_logprobs_last_n: int | None = Field(None, ge=1)


class PathBody(TinkerBody):
    """Weights, by their path."""

    tinker_path: str


class TtlBody(TinkerBody):
    """How long weights are kept from now on; null: for ever."""

    ttl_seconds: int | None = None


class CopyBody(TinkerBody):
    """Copy weights into a session, or a project."""

    source_path: str
    session_id: str | None = None
    model_seq_id: int | None = Field(None, ge=0, le=MAX_INT)
    destination_project_id: str | None = None
    ttl_seconds: int | None = None


# What a parameter may be, where it may be several things.
ALTERNATIVES = {"stop": "a text, a list of texts, or a list of tokens"}


def understand(body_class: type[B], raw: bytes) -> B:
    """A body. InvalidInput names what is wrong."""
    return parse(body_class, raw, ALTERNATIVES)


def understand_operation(body_class: type[B], raw: bytes) -> tuple[OperationBody, B | InvalidInput]:
    """(the operation's place, its body or what is wrong with it). InvalidInput where not even the place can be read."""
    place = parse(OperationBody, raw, {})
    try:
        return place, understand(body_class, raw)
    except InvalidInput as fault:
        return place, fault


def optim_step(body: OptimStepBody) -> OptimStep | InvalidInput:
    """The step that is asked for, or what is wrong with it."""
    if body.optimizer_params is not None:
        kind = str(body.optimizer_params.get("type", "?"))
        return InvalidInput(f"the optimizer {kind[:60]!r} is not supported; use AdamW", "optimizer_params")
    try:
        adam = understand(AdamBody, msgspec.json.encode(body.adam_params or {}))
    except (InvalidInput, msgspec.MsgspecError) as fault:
        return InvalidInput(f"adam_params.{fault}", "adam_params")
    return OptimStep(
        adam.learning_rate, adam.beta1, adam.beta2, adam.eps, adam.weight_decay, max(0.0, adam.grad_clip_norm)
    )


def check_optimizer(optimizer: OptimizerBody | None) -> None:
    """InvalidInput for one that we lack."""
    if optimizer is not None and optimizer.type != "adamw":
        raise InvalidInput(f"the optimizer {optimizer.type[:60]!r} is not supported; use adamw", "optimizer_config")


def sample(body: SampleBody, sampler: Sampler) -> Sample:
    """The request as a worker reads it. InvalidInput."""
    prompt_ids = tuple(token for chunk in body.prompt.chunks for token in _text_tokens(chunk))
    targets, num_targets = _targets(body.target_prompt_logprobs, len(prompt_ids))
    if body.prompt_logprobs_last_n is not None and not body.prompt_logprobs:
        raise InvalidInput("prompt_logprobs_last_n needs prompt_logprobs", "prompt_logprobs_last_n")
    return Sample(
        sampler,
        prompt_ids,
        _params(body),
        body.num_samples,
        body.prompt_logprobs_last_n,
        targets,
        num_targets,
        body.prompt_alt_tokens_k,
    )


def _params(body: SampleBody) -> SamplingParams:
    """`max_tokens` of None is for the caller to fill in, who knows the context."""
    asked = body.sampling_params
    stop = [asked.stop] if isinstance(asked.stop, str) else (asked.stop or [])
    scores_prompt = bool(body.prompt_logprobs) or body.topk_prompt_logprobs > 0
    return SamplingParams(
        max_tokens=asked.max_tokens or 1,
        temperature=asked.temperature,
        top_k=asked.top_k if asked.top_k > 0 else None,
        top_p=asked.top_p,
        seed=asked.seed,
        stop=tuple(each for each in stop if isinstance(each, str)),
        stop_token_ids=frozenset(each for each in stop if isinstance(each, int)),
        num_logprobs=body.topk_sample_logprobs,
        num_prompt_logprobs=body.topk_prompt_logprobs if scores_prompt else None,
        ignore_eos=asked.stop == [],  # an empty list means: stop for nothing
    )


def _text_tokens(chunk: ChunkBody) -> list[int]:
    if chunk.type != "encoded_text":
        raise InvalidInput(f"the prompt has a chunk of the type {chunk.type[:60]!r}; only text is supported", "prompt")
    return chunk.tokens


def _targets(tensor: TensorBody | None, num_prompt: int) -> tuple[tuple[int, ...], int]:
    """(tokens row by row, how many there are in a row); what a sparse matrix does not have asks for nothing."""
    if tensor is None:
        return (), 0
    shape = tensor.shape or []
    if len(shape) != 2 or shape[0] != num_prompt - 1 or shape[1] < 1:
        raise InvalidInput(
            f"target_prompt_logprobs must have the shape [{num_prompt - 1}, K] for a prompt of {num_prompt} tokens, "
            f"not {shape}",
            "target_prompt_logprobs",
        )
    num_rows, num_columns = shape
    if num_columns > MAX_TARGETS:
        raise InvalidInput(f"target_prompt_logprobs may have {MAX_TARGETS} tokens at each place, not {num_columns}")
    tokens = tensor.data if tensor.sparse_crow_indices is None else _filled(tensor, num_rows, num_columns)
    if len(tokens) != num_rows * num_columns:
        raise InvalidInput(f"target_prompt_logprobs has {len(tokens)} values, and its shape {shape} wants others")
    return tuple(tokens), num_columns


def _filled(tensor: TensorBody, num_rows: int, num_columns: int) -> list[int]:
    starts, columns = tensor.sparse_crow_indices or [], tensor.sparse_col_indices or []
    is_sound = (
        len(starts) == num_rows + 1
        and starts == sorted(starts)
        and starts[0] == 0
        and starts[-1] == len(columns) == len(tensor.data)
        and all(0 <= column < num_columns for column in columns)
    )
    if not is_sound:
        raise InvalidInput("target_prompt_logprobs is no sparse matrix of its shape: its indices do not fit")
    filled = [NO_TOKEN] * (num_rows * num_columns)
    for row in range(num_rows):
        for index in range(starts[row], starts[row + 1]):
            filled[row * num_columns + columns[index]] = tensor.data[index]
    return filled
