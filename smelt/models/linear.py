"""Linear: every matrix product of a model goes through here, so that layouts and kernels have one place.

Knows no architecture. Shapes: (..., in_features) -> (..., out_features).
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smelt.models.devices import cpu_features
from smelt.models.fixed_tiles import product_in_tiles, row_by_row
from smelt.models.kernels import Kernels, kernels, product_kernels


class Linear(nn.Linear):
    """y = x W^T + b, with W stored (out_features, in_features)."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        return product(x, self.weight, self.bias)


class Int8Linear(nn.Module):
    """y = x (s W)^T + b for inference: W in int8, with one scale per output. x is fp32 or bf16, and so is y."""

    weight: Tensor
    scales: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """Rounds `weight` (out_features, in_features) to the nearest of 255 steps between its row's extremes."""
        super().__init__()
        scales = weight.float().abs().amax(dim=1) / 127
        steps = weight.float() / scales.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
        self.register_buffer("weight", steps.round().to(torch.int8))
        self.register_buffer("scales", scales)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features). Where no kernel fits, the weights are written out in x's dtype."""
        if (fast := _kernels_for(x)) is not None:
            return fast.linear_int8(x.contiguous(), self.weight, self.scales, self.bias)
        if x.dtype == torch.float16:  # unscaled sums would leave its range
            return F.linear(x, (self.weight * self.scales[:, None]).to(x.dtype), self.bias)
        y = F.linear(x, self.weight.to(x.dtype)) * self.scales
        return (y if self.bias is None else y + self.bias).to(x.dtype)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b. For a few rows on a CPU by our own kernel, which no gradient passes through."""
    if (tiled := product_in_tiles()) is not None:
        return tiled(x, weight, bias)
    fast = None if torch.is_grad_enabled() else _kernels_for(x)
    if fast is not None and weight.is_contiguous() and x.dtype == weight.dtype:
        return fast.linear(x.contiguous(), weight, bias)
    if not torch.is_grad_enabled() and (fast := product_kernels(x)) is not None and x.dtype == weight.dtype:
        return row_by_row(x.flatten(0, -2), weight.t(), bias).view(*x.shape[:-1], -1)
    return F.linear(x, weight, bias)


def _kernels_for(x: Tensor) -> Kernels | None:
    if torch.compiler.is_compiling() or x.device.type != "cpu":
        return None
    return kernels() if 0 < x.numel() <= most_rows(x.dtype) * x.shape[-1] else None


@cache
def most_rows(dtype: torch.dtype) -> int:
    """How many rows our kernel takes; torch is faster from there on, since it reorders the weights first."""
    if dtype == torch.float32:
        return 48
    if dtype == torch.bfloat16:
        return 16 if cpu_features()["amx"] else 32
    return 0
