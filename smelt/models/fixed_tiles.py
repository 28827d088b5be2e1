"""Products of matrices in which a row's bits do not depend on who else is computed. Knows no model.

Libraries choose how to sum by the number of rows, so the same row comes out with other bits in other company. Our own
kernel sums each row alike. Without it every product within `fixed_tiles` has TILE_ROWS, the last tile filled up with
zeros.

Shapes: N rows, (N, C) -> (N, O).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from smelt.models.kernels import product_kernels

TILE_ROWS = 128  # fewer are slower, and more waste what is filled up: docs/experiments.md

Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # (..., C), W (O, C), b -> (..., O)


def tiled_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b; gradients pass to x alone."""
    y: Tensor = _TiledProduct.apply(x.flatten(0, -2), weight, bias)  # type: ignore[no-untyped-call]
    return y.view(*x.shape[:-1], -1)


_product: ContextVar[Product | None] = ContextVar("product", default=None)


@contextmanager
def fixed_tiles(product: Product = tiled_product) -> Iterator[None]:
    """Compute the products of models so, in this thread. Their weights get no gradients."""
    token = _product.set(product)
    try:
        yield
    finally:
        _product.reset(token)


def product_in_tiles() -> Product | None:
    """What computes products now, where a row's bits must be its own."""
    return _product.get()


class _TiledProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NC: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight = weight  # frozen, so that nothing has to watch over it
        return row_by_row(x_NC, weight.t(), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (g_NO,) = gradients
        weight: Tensor = ctx.weight
        return row_by_row(g_NO, weight), None, None


def row_by_row(x_NC: Tensor, weight_CO: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W + b, each row as it would be alone. No gradient passes."""
    y_NO = x_NC.new_empty(len(x_NC), weight_CO.shape[1])
    if (fast := product_kernels(x_NC)) is not None and x_NC.dtype == weight_CO.dtype and _lies_plainly(weight_CO):
        fast.matmul(x_NC.contiguous(), weight_CO, bias, y_NO)
    else:
        _in_tiles(x_NC, weight_CO, bias, y_NO)
    return y_NO


def _lies_plainly(weight: Tensor) -> bool:
    return weight.is_contiguous() or weight.t().is_contiguous()


def _in_tiles(x_NC: Tensor, weight_CO: Tensor, bias: Tensor | None, y_NO: Tensor) -> None:
    """Whole tiles are written where they belong: copies were a tenth of a pass."""
    for start in range(0, len(x_NC), TILE_ROWS):
        tile = slice(start, min(start + TILE_ROWS, len(x_NC)))
        is_whole = tile.stop - tile.start == TILE_ROWS
        out = y_NO[tile] if is_whole else x_NC.new_empty(TILE_ROWS, weight_CO.shape[1])
        rows = x_NC[tile] if is_whole else F.pad(x_NC[tile], (0, 0, 0, tile.start + TILE_ROWS - tile.stop))
        if bias is None:
            torch.mm(rows, weight_CO, out=out)
        else:
            torch.addmm(bias, rows, weight_CO, out=out)
        if not is_whole:
            y_NO[tile] = out[: tile.stop - tile.start]
