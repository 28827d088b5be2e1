"""Work on single rows between the products of a decoder: norms, gates, rotary positions, writing into a cache.

Compiled where it can be. Knows no architecture. Shapes: B rows, T tokens, H heads, D width of a head; N tokens in
one row, G heads of keys.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smelt.models import frozen_rowwise
from smelt.models.fixed_tiles import product_in_tiles
from smelt.models.kernels import Kernels, kernels_for_dtype

MOST_LOOKED_UP = 64  # of a step that writes; whoever sends more to a model has them checked by torch
FEW = 1 << 17  # numbers; for more it is worth waking torch's other threads


class Embedding(nn.Embedding):
    """A vector for each id."""

    def forward(self, ids: Tensor) -> Tensor:
        """(...) below the number of ids -> (..., C)."""
        if ids.numel() <= MOST_LOOKED_UP and (fast := kernels_for(self.weight)) is not None and ids.is_contiguous():
            return fast.look_up(self.weight, ids)
        return super().forward(ids)


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        if (fast := kernels_for(x)) is not None and x.is_contiguous() and x.dtype == self.weight.dtype:
            return fast.rms_norm(x, self.weight, self.eps or 0.0)
        if (fast := frozen_rowwise.frozen_kernels(x)) is not None and x.dtype == self.weight.dtype:
            return frozen_rowwise.rms_norm(x, self.weight, self.eps or 0.0, fast)
        return F.rms_norm(x, self.normalized_shape, self.weight, self.eps)


class LayerNorm(nn.LayerNorm):
    """(x - mean(x)) / sqrt(variance(x) + eps) * weight + bias."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        is_plain = x.is_contiguous() and x.dtype == self.weight.dtype
        if is_plain and x.numel() <= FEW and (fast := kernels_for(x)) is not None:
            return fast.layer_norm(x, self.weight, self.bias, self.eps)
        return super().forward(x)


def norm_heads(x_BTHD: Tensor, of_queries: RMSNorm, of_keys: RMSNorm, num_queries: int) -> Tensor:
    """(B, T, H, D): the heads of queries and those of keys, each by its own norm."""
    num_rows, _, num_heads, width = x_BTHD.shape
    fast = (
        kernels_for(x_BTHD) if num_rows == 1 and x_BTHD.stride()[2:] == (width, 1) and x_BTHD.numel() <= FEW else None
    )
    if fast is not None and x_BTHD.dtype == of_queries.weight.dtype:
        eps = of_queries.eps or 0.0
        return fast.norm_heads(x_BTHD[0], of_queries.weight, of_keys.weight, num_queries, eps)[None]
    q_BTHD, k_BTGD = x_BTHD.split_with_sizes((num_queries, num_heads - num_queries), 2)
    return torch.cat((of_queries(q_BTHD), of_keys(k_BTGD)), dim=2)


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU in its tanh form, as GPT-2 has it."""
    if x.numel() <= FEW and (fast := kernels_for(x)) is not None and x.is_contiguous():
        return fast.gelu_tanh(x)
    return F.gelu(x, approximate="tanh")


def add(x: Tensor, y: Tensor) -> Tensor:
    """x + y."""
    if x.numel() <= FEW and (fast := kernels_for(x)) is not None and x.dtype == y.dtype and x.shape == y.shape:
        return fast.add(x.contiguous(), y.contiguous())
    return x + y


def swiglu(x: Tensor) -> Tensor:
    """(..., 2F) -> (..., F): silu(first half) * second half."""
    if (fast := kernels_for(x)) is not None and x.is_contiguous():
        return fast.swiglu(x)
    if (fast := frozen_rowwise.frozen_kernels(x)) is not None:
        return frozen_rowwise.swiglu(x, fast)
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def rotate(x_BTHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions, halves convention (as in Hugging Face's Llama); the first half of `sin` is negative.

    `cos` and `sin` are (B or 1, T, 1, D).
    """
    num_rows, _, _, width = x_BTHD.shape
    if num_rows == 1 and x_BTHD.stride()[2:] == (width, 1):
        if (fast := kernels_for(x_BTHD)) is not None:
            return fast.rotate(x_BTHD[0], cos, sin)[None]
        if (fast := frozen_rowwise.frozen_kernels(x_BTHD)) is not None:
            return frozen_rowwise.rotate(x_BTHD[0], cos, sin, fast)[None]
    return torch.addcmul(x_BTHD * cos, x_BTHD.roll(width // 2, -1), sin)


def write_cache(k_NGD: Tensor, v_NGD: Tensor, places_NG: Tensor, keys: Tensor, values: Tensor) -> None:
    """Put vectors at these places of contiguous keys and values (..., D), seen as lists of vectors."""
    width = k_NGD.shape[-1]
    fast = kernels_for(k_NGD) if k_NGD.stride()[1:] == v_NGD.stride()[1:] == (width, 1) else None
    if fast is not None and k_NGD.dtype == keys.dtype:
        fast.write_cache(k_NGD, v_NGD, places_NG, keys, values)
        return
    for vectors, cache in ((k_NGD, keys), (v_NGD, values)):
        cache.view(-1, width).index_copy_(0, places_NG.reshape(-1), vectors.reshape(-1, width))


def kernels_for(x: Tensor, dtype: torch.dtype | None = None) -> Kernels | None:
    """Where there are some for that dtype or x's own, and no gradient is wanted, which would not pass through them.

    Not in fixed tiles: whether they take a row depends on how many there are, and they round in their own way.
    """
    if torch.is_grad_enabled() or product_in_tiles() is not None:
        return None
    return kernels_for_dtype(x, x.dtype if dtype is None else dtype)
