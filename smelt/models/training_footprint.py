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
    """What a run takes on its device; on a CPU the copies of a checkpoint lie there too."""
    num_all = work.shape.num_parameters
    num_trained = num_all if work.num_trained is None else work.num_trained
    rounded = 0 if work.dtype == "float32" else DTYPE_BYTES[work.dtype]
    frozen = num_all - num_trained if work.num_trained is not None else 0
    return TrainingFootprint(
        weights=num_trained * (4 + rounded) + frozen * DTYPE_BYTES[work.dtype],
        gradients=4 * num_trained,
        moments=8 * num_trained,
        activations=activation_bytes(work),
        checkpoint=12 * num_trained if work.on_cpu else 0,
    )


def activation_bytes(work: Workload) -> int:
    """What one forward pass leaves for backward, and what the loss holds when backward begins."""
    shape, size = work.shape, DTYPE_BYTES[work.dtype]
    num_tokens = work.batch_size * work.block_size
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
    """The nearest settings of the same global batch that fit; None where not even a row at a time does."""
    return next((each for each in _smaller(work) if training_footprint(each).total <= num_bytes), None)


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
