"""Work on single rows between the products of a decoder: norms, gates, rotary positions, writing into a cache.

Compiled where it can be. Knows no architecture. Shapes: B rows, T tokens, H heads, D width of a head; N tokens in
one row, G heads of keys.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smelt.models.kernels import Kernels, kernels


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        if (fast := _kernels_for(x)) is not None and x.is_contiguous() and x.dtype == self.weight.dtype:
            return fast.rms_norm(x, self.weight, self.eps or 0.0)
        return F.rms_norm(x, self.normalized_shape, self.weight, self.eps)


def swiglu(x: Tensor) -> Tensor:
    """(..., 2F) -> (..., F): silu(first half) * second half."""
    if (fast := _kernels_for(x)) is not None and x.is_contiguous():
        return fast.swiglu(x)
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def rotate(x_BTHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions, halves convention (as in Hugging Face's Llama); the first half of `sin` is negative.

    `cos` and `sin` are (B or 1, T, 1, D).
    """
    num_rows, _, _, width = x_BTHD.shape
    fast = _kernels_for(x_BTHD) if num_rows == 1 and x_BTHD.stride()[2:] == (width, 1) else None
    if fast is not None:
        return fast.rotate(x_BTHD[0], cos, sin)[None]
    return torch.addcmul(x_BTHD * cos, x_BTHD.roll(width // 2, -1), sin)


def write_cache(k_NGD: Tensor, v_NGD: Tensor, places_NG: Tensor, keys: Tensor, values: Tensor) -> None:
    """Put vectors at these places of contiguous keys and values (..., D), seen as lists of vectors."""
    width = k_NGD.shape[-1]
    fast = _kernels_for(k_NGD) if k_NGD.stride()[1:] == v_NGD.stride()[1:] == (width, 1) else None
    if fast is not None and k_NGD.dtype == keys.dtype:
        fast.write_cache(k_NGD, v_NGD, places_NG, keys, values)
        return
    for vectors, cache in ((k_NGD, keys), (v_NGD, values)):
        cache.view(-1, width).index_copy_(0, places_NG.reshape(-1), vectors.reshape(-1, width))


def _kernels_for(x: Tensor) -> Kernels | None:
    """Where there are some, and no gradient is wanted, which would not pass through them."""
    if torch.is_grad_enabled() or x.device.type != "cpu" or x.dtype not in (torch.float32, torch.bfloat16):
        return None
    return None if torch.compiler.is_compiling() else kernels()
