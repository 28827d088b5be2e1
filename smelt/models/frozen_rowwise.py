"""Work on single rows of frozen models with its gradient, by our own kernels; knows no architecture.

What a row gets is its own, as in `fixed_tiles`, and rounded as the engine rounds it.

Shapes: N tokens, H heads, D width.
"""

from typing import Any

import torch
from torch import Tensor

from smelt.models.fixed_tiles import product_in_tiles
from smelt.models.kernels import Kernels, product_kernels


def frozen_kernels(x: Tensor) -> Kernels | None:
    """Where gradients pass to x alone, and our kernels compute the products too."""
    return product_kernels(x) if product_in_tiles() is not None else None


def rms_norm(x: Tensor, weight: Tensor, eps: float, fast: Kernels) -> Tensor:
    """(..., C): `torch.nn.functional.rms_norm` over the last dimension."""
    y: Tensor = _RMSNorm.apply(x, weight, eps, fast)  # type: ignore[no-untyped-call]
    return y


def swiglu(x: Tensor, fast: Kernels) -> Tensor:
    """(..., 2F) -> (..., F): silu(first half) * second half."""
    y: Tensor = _SwiGLU.apply(x, fast)  # type: ignore[no-untyped-call]
    return y


def rotate(x_NHD: Tensor, cos: Tensor, sin: Tensor, fast: Kernels) -> Tensor:
    """(N, H, D): as `layers.rotate`; each token's heads in one piece."""
    y_NHD: Tensor = _Rotate.apply(x_NHD, cos, sin, fast)  # type: ignore[no-untyped-call]
    return y_NHD


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, fast: Kernels) -> Tensor:
        ctx.weight, ctx.eps, ctx.fast = weight, eps, fast
        x = x.contiguous()
        ctx.save_for_backward(x)
        return fast.rms_norm(x, weight, eps)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (x,) = ctx.saved_tensors
        return ctx.fast.training.rms_norm_back(x, ctx.weight, gradients[0].contiguous(), ctx.eps), None, None, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, fast: Kernels) -> Tensor:
        ctx.fast = fast
        x = x.contiguous()
        ctx.save_for_backward(x)
        return fast.swiglu(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return ctx.fast.training.swiglu_back(x, gradients[0].contiguous()), None


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NHD: Tensor, cos: Tensor, sin: Tensor, fast: Kernels) -> Tensor:
        ctx.tables, ctx.fast = (cos, sin), fast
        return fast.rotate(x_NHD, cos, sin)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.tables
        return ctx.fast.rotate(gradients[0].contiguous(), cos, -sin), None, None, None
