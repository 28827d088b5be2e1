"""What a training session is asked to do, and what is sampled from it: bodies of Grants and Results; does nothing.

A session is a model held open for training by request, and a lane of the ledger: its operations are granted in the
order of their seq, the first of them CreateModel or LoadWeights. A sampler is frozen weights to draw from: a base
model, or an adapter as it was at one place of a lane.

    kind of the Grant           body              body of the Result
    create_model                CreateModel       JSON, as Tinker's clients want it
    forward_backward            protobuf          protobuf (tinker_wire): both as they go over HTTP
    optim_step                  OptimStep         JSON
    save_weights                SaveWeights       JSON
    load_weights                LoadWeights       JSON
    save_weights_for_sampler    SaveForSampler    JSON
    save_weights_external       SaveForSampler    JSON: the same files, for others than us
    merge_weights               MergeWeights      JSON
    unload_model                UnloadSession     JSON
    sample                      Sample            protobuf

What a Result's JSON has, beside "type", the kind:

    create_model, unload_model  {"model_id"}
    optim_step                  {"metrics": {name: number}}
    save_weights                {"path"}
    load_weights                {"path", "model_id"}
    save_weights_for_sampler    {"path"} of a named one, else {"sampling_session_id"}
    save_weights_external       {"path"}
    merge_weights               {"model"}

An operation that was wrong when it came takes its place in the lane and has failed before it could be granted, so a
lane's grants may have gaps. The log says what lies in a gap; a seq that is not even there never came, and counts as a
forward_backward that failed. A window (what lies between two optim_steps) in which one failed never steps: its
optim_step fails too, and an optim_step that failed, whatever for, drops the window's gradient.

Once a load_weights is answered its checkpoint may be removed: a worker takes a snapshot before it answers.

Folders are given relative to the home folder, which API and workers share.
"""

import msgspec

from smelt.types import SamplingParams

# In a lane, one after the other; what it makes is a function of the lane's log, so that it can be computed again.
TRAINING_KINDS = (
    "create_model",
    "forward_backward",
    "optim_step",
    "save_weights",
    "load_weights",
    "save_weights_for_sampler",
    "save_weights_external",
    "merge_weights",
    "unload_model",
)
SAMPLE = "sample"


class CreateModel(msgspec.Struct, frozen=True, omit_defaults=True):
    """Open a session on a base model: a LoRA adapter of that rank, or with rank 0 all weights."""

    base_model: str
    rank: int
    seed: int
    train_attn: bool = True
    train_mlp: bool = True
    train_unembed: bool = True


class OptimStep(msgspec.Struct, frozen=True, omit_defaults=True):
    """AdamW with decoupled decay on the gradients since the last step; `grad_clip_norm` 0 does not clip."""

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0


class SaveWeights(msgspec.Struct, frozen=True, omit_defaults=True):
    """Keep weights and optimizer as they are at this place of the lane. `path` is what the client calls it."""

    folder: str
    path: str


class LoadWeights(msgspec.Struct, frozen=True, omit_defaults=True):
    """Go on from a checkpoint, with its optimizer or a fresh one. At the beginning of a lane it opens the session."""

    folder: str
    path: str
    with_optimizer: bool
    base_model: str


class SaveForSampler(msgspec.Struct, frozen=True, omit_defaults=True):
    """Freeze the weights for a sampler; with a `path` they have a name, else they live as long as their session."""

    folder: str
    sampler_id: str
    path: str | None = None


class MergeWeights(msgspec.Struct, frozen=True, omit_defaults=True):
    """Write the base model with the adapter in its weights as a model of that name, in the models' folder."""

    name: str
    models_folder: str


class UnloadSession(msgspec.Struct, frozen=True, omit_defaults=True):
    """The session is over: its memory is free for others."""


class Sampler(msgspec.Struct, frozen=True, omit_defaults=True):
    """Weights to draw from. `folder` None: those of the base model."""

    sampler_id: str
    base_model: str
    folder: str | None = None
    # Where an ephemeral one was made: whoever has lost it makes it again from the lane's log.
    lane: str | None = None
    seq: int | None = None


class Sample(msgspec.Struct, frozen=True, omit_defaults=True):
    """Draw `num_samples` answers to a prompt, sample i with seed + i; stop tokens are kept in what is returned.

    `target_ids` ask for the log-probabilities of these tokens at each place of the prompt but the first, (places, K)
    row by row, -1 for none; `num_alternatives` for tokens drawn at each of these places. Prompts are scored where
    `params.num_prompt_logprobs` is given.
    """

    sampler: Sampler
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    num_samples: int = 1
    last_prompt_logprobs: int | None = None  # only of so many tokens at the prompt's end
    target_ids: tuple[int, ...] = ()
    num_targets: int = 0
    num_alternatives: int = 0


class LogEntry(msgspec.Struct, frozen=True, array_like=True):
    """An operation of a lane that was done before; one that has `failed` is not done again."""

    seq: int
    kind: str
    body: bytes
    failed: bool = False
