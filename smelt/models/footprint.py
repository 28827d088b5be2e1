"""How much memory a model takes to serve, by its shape alone; loads nothing and knows no torch."""

from smelt.configs import DecoderConfig
from smelt.models.architectures import layout_of

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
SCALE_BYTES = 4  # of each row of a quantized matrix


def weights_bytes(config: DecoderConfig, dtype_bytes: int, quantized: bool = False) -> int:
    """Bytes of all parameters; `quantized`: one byte per element of each linear layer, and a scale per row.

    The embedding keeps its dtype; where the output head is tied to it, the head is a quantized copy.
    """
    if not quantized:
        return config.num_parameters * dtype_bytes
    num_elements, num_rows = _linear_layers(config)
    num_copied = config.vocab_size * config.n_embd if config.tied else 0
    num_kept = config.num_parameters - (num_elements - num_copied)
    return num_kept * dtype_bytes + num_elements + num_rows * SCALE_BYTES


def adapter_values(config: DecoderConfig, rank: int) -> int:
    """Values of a LoRA adapter of such a rank on every matrix within the blocks."""
    return sum(
        rank * (shape[0] + shape[1])
        for name, stored in layout_of(config).items()
        for shape in stored.shapes
        if name.startswith("blocks.") and name.endswith(".weight") and len(shape) == 2
    )


def kv_bytes_per_token(config: DecoderConfig, dtype_bytes: int) -> int:
    """Bytes that the cache holds for each token of a sequence: a key and a value per layer and key/value head."""
    return 2 * config.n_layer * config.n_kv_head * config.head_dim * dtype_bytes


def _linear_layers(config: DecoderConfig) -> tuple[int, int]:
    """(elements, rows) of every matrix that is multiplied with, the output head among them."""
    width = config.n_embd
    qkv_rows = (config.n_head + 2 * config.n_kv_head) * config.head_dim
    up_rows = (2 if config.mlp == "swiglu" else 1) * config.n_inner
    elements = width * (qkv_rows + up_rows + config.n_head * config.head_dim + config.n_inner)
    rows = qkv_rows + up_rows + 2 * width
    return config.n_layer * elements + config.vocab_size * width, config.n_layer * rows + config.vocab_size
