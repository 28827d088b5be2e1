"""Products of matrices, always with the same number of rows: then a row's bits do not depend on who else is computed.

Libraries choose how to sum by the number of rows, so the same row comes out with other bits in other company. Within
`fixed_tiles` every product of a model has TILE_ROWS, the last tile filled up with zeros. Knows no model.

Shapes: N rows, (N, C) -> (N, O).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

TILE_ROWS = 128  # fewer are slower, and more waste what is filled up: docs/experiments.md

_is_on: ContextVar[bool] = ContextVar("fixed_tiles", default=False)


@contextmanager
def fixed_tiles() -> Iterator[None]:
    """Compute the products of models in tiles, in this thread. Their weights get no gradients."""
    token = _is_on.set(True)
    try:
        yield
    finally:
        _is_on.reset(token)


def in_fixed_tiles() -> bool:
    """Whether products are to be computed in tiles."""
    return _is_on.get()


def tiled_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b, tile by tile; gradients pass to x alone."""
    y: Tensor = _TiledProduct.apply(x.flatten(0, -2), weight, bias)  # type: ignore[no-untyped-call]
    return y.view(*x.shape[:-1], -1)


def tiles_of(num_rows: int) -> Iterator[slice]:
    """Where each tile begins and ends; the last may be shorter."""
    return (slice(start, min(start + TILE_ROWS, num_rows)) for start in range(0, num_rows, TILE_ROWS))


def filled(x_NC: Tensor) -> Tensor:
    """A tile with all its rows."""
    return x_NC if len(x_NC) == TILE_ROWS else F.pad(x_NC, (0, 0, 0, TILE_ROWS - len(x_NC)))


class _TiledProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NC: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight = weight  # frozen, so that nothing has to watch over it
        return _in_tiles(x_NC, weight.t(), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (g_NO,) = gradients
        weight: Tensor = ctx.weight
        return _in_tiles(g_NO, weight, None), None, None


def _in_tiles(x_NC: Tensor, weight_CO: Tensor, bias: Tensor | None) -> Tensor:
    """Whole tiles are written where they belong: copies were a tenth of a pass."""
    y_NO = x_NC.new_empty(len(x_NC), weight_CO.shape[1])
    for tile in tiles_of(len(x_NC)):
        is_whole = tile.stop - tile.start == TILE_ROWS
        out = y_NO[tile] if is_whole else x_NC.new_empty(TILE_ROWS, weight_CO.shape[1])
        if bias is None:
            torch.mm(filled(x_NC[tile]), weight_CO, out=out)
        else:
            torch.addmm(bias, filled(x_NC[tile]), weight_CO, out=out)
        if not is_whole:
            y_NO[tile] = out[: tile.stop - tile.start]
    return y_NO
