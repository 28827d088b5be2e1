"""How much memory training takes, by shape and settings alone, and how to take less; loads nothing, knows no torch.

What is counted is what the code holds at the worst moment, the beginning of backward: see `activation_bytes`. Measured
peaks were 0.96 to 1.13 of it (docs/experiments.md).
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

from smelt.configs import DecoderConfig
from smelt.models.footprint import DTYPE_BYTES

GIB = 2**30
PROCESS_BYTES = 380 * 2**20  # Python, torch and its threads, before there is any model
WRITTEN_OUT_TOKENS = 512  # up to which rows in bf16 on a CPU hold their attention scores
SHARDINGS = ("none", "optimizer", "full")  # each holds less than the one before, and sends more


@dataclass(frozen=True, slots=True)
class Workload:
    """What is trained, and how. `num_trained` None: all parameters."""

    shape: DecoderConfig
    dtype: str  # float32, bfloat16 or float16
    batch_size: int
    block_size: int
    gradient_accumulation_steps: int = 1
    gradient_checkpointing: bool = False
    num_trained: int | None = None
    on_cpu: bool = True
    num_ranks: int = 1
    sharding: str = "none"

    @property
    def rows_at_once(self) -> int:
        """Rows in a forward pass of one rank."""
        return min(self.batch_size, max(1, self.batch_size * self.gradient_accumulation_steps // self.num_ranks))

    @property
    def num_parts(self) -> int:
        """Into how many parts each tensor is cut."""
        return self.num_ranks if self.sharding != "none" else 1


@dataclass(frozen=True, slots=True)
class TrainingFootprint:
    """Bytes by what they hold."""

    weights: int
    gradients: int
    moments: int  # AdamW's two, in fp32
    activations: int
    checkpoint: int  # copies that are written while training goes on
    process: int = PROCESS_BYTES

    @property
    def total(self) -> int:
        """All together."""
        return sum(asdict(self).values())

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in asdict(self).items())
        return f"{self.total / GIB:.1f} GiB ({parts})"


def training_footprint(work: Workload) -> TrainingFootprint:
    """What each rank of a run takes on its device.

    On a CPU the copies of a checkpoint lie there too: those that the first rank makes, as each one's share.
    """
    if work.num_parts > 1:
        return _in_parts(work)
    num_all = work.shape.num_parameters
    num_trained = num_all if work.num_trained is None else work.num_trained
    rounded = 0 if work.dtype == "float32" else DTYPE_BYTES[work.dtype]
    frozen = num_all - num_trained if work.num_trained is not None else 0
    return TrainingFootprint(
        weights=num_trained * (4 + rounded) + frozen * DTYPE_BYTES[work.dtype],
        gradients=4 * num_trained,
        moments=8 * num_trained,
        activations=activation_bytes(work),
        checkpoint=12 * num_trained // work.num_ranks if work.on_cpu else 0,
    )


def _in_parts(work: Workload) -> TrainingFootprint:
    """The same of sharded weights: a rank's part, and what is gathered and summed beside it."""
    num_all, num_parts, size = work.shape.num_parameters, work.num_parts, DTYPE_BYTES[work.dtype]
    num_trained = num_all if work.num_trained is None else work.num_trained
    block = work.shape.replace(n_layer=work.shape.n_layer + 1).num_parameters - num_all
    outside = num_all - work.shape.n_layer * block
    gathered = min(num_all, outside + 2 * block) if work.sharding == "full" else num_all  # the next block comes early
    waits = work.sharding == "optimizer" and work.gradient_accumulation_steps > work.num_ranks
    unsummed = 4 * num_trained if waits else min(num_trained, outside + block) * (size + 4)
    whole = 4 * num_trained + (num_all - num_trained) * size
    activations = activation_bytes(work)
    beside = gathered * size
    if work.on_cpu:  # before it computes each rank makes or reads all weights, and keeps its part
        beside = max(beside, whole - unsummed - activations)
    return TrainingFootprint(
        weights=whole // num_parts + beside,
        gradients=4 * num_trained // num_parts + unsummed,
        moments=8 * num_trained // num_parts,
        activations=activations,
        checkpoint=12 * num_trained // num_parts if work.on_cpu else 0,
    )


def activation_bytes(work: Workload) -> int:
    """What one forward pass leaves for backward, and what the loss holds when backward begins."""
    shape, size = work.shape, DTYPE_BYTES[work.dtype]
    num_tokens = work.rows_at_once * work.block_size
    inside = _block_bytes_per_token(work)
    kept = shape.n_embd * size  # the residual stream between blocks
    layers = shape.n_layer * kept + inside if work.gradient_checkpointing else shape.n_layer * (kept + inside)
    # Log-probabilities, their gradient and that of the logits in fp32, and the logits themselves where they are not.
    logits = shape.vocab_size * (12 + (0 if work.dtype == "float32" else size))
    return num_tokens * (layers + 2 * kept + logits)


def _block_bytes_per_token(work: Workload) -> int:
    """What backward needs of one block: each input of a product, a norm, an activation and the attention."""
    shape, size = work.shape, DTYPE_BYTES[work.dtype]
    qkv = (shape.n_head + 2 * shape.n_kv_head) * shape.head_dim
    heads = shape.n_head * shape.head_dim
    rotated = (shape.n_head + shape.n_kv_head) * shape.head_dim if shape.position == "rope" else 0
    up = shape.n_inner * (2 if shape.mlp == "swiglu" else 1)
    vectors = 3 * shape.n_embd + 2 * qkv + rotated + 2 * heads + up + shape.n_inner
    scores = 0
    if work.on_cpu and work.dtype == "bfloat16" and work.block_size <= WRITTEN_OUT_TOKENS:
        scores = shape.n_head * work.block_size * (4 + size)  # the softmax in fp32, and rounded
    return vectors * size + scores


def fitting(work: Workload, num_bytes: int) -> Workload | None:
    """The nearest settings of the same global batch that fit; None where not even a row at a time does.

    Ranks that are there anyway may hold parts, which is asked for last.
    """
    shardings = SHARDINGS[SHARDINGS.index(work.sharding) :] if work.num_ranks > 1 else (work.sharding,)
    candidates = (each for sharding in shardings for each in _smaller(replace(work, sharding=sharding)))
    return next((each for each in candidates if training_footprint(each).total <= num_bytes), None)


def _smaller(work: Workload) -> Iterator[Workload]:
    """The same work with ever fewer rows at once, each first as fast as can be, then with less memory."""
    rows, passes = work.batch_size, work.gradient_accumulation_steps
    while True:
        again = replace(work, batch_size=rows, gradient_accumulation_steps=passes)
        yield again
        if rows <= work.batch_size // 4 or rows == 1:  # recomputing costs a third; few rows at once cost more
            yield replace(again, gradient_checkpointing=True)
        if rows == 1:
            return
        smaller = max(divisor for divisor in range(1, rows) if rows % divisor == 0)
        rows, passes = smaller, passes * (rows // smaller)
