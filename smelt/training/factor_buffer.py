"""Where the factors of an adapter lie in a flat buffer; knows neither adapters nor their training.

For each fused matrix A (P r, in), the parts' below each other, and then B (out, r): so a stack of such buffers is one
of every factor, without a copy. Shapes: P parts of a matrix, r the rank.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from smelt.models.adapter_folders import Matrix


def num_values(matrices: Mapping[str, Matrix], rank: int) -> int:
    """How long such a buffer is."""
    return sum(sum(_sizes(matrix, rank)) for matrix in matrices.values())


def factor_views(buffers: Tensor, matrices: Mapping[str, Matrix], rank: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Of each matrix A (..., P r, in) and B (..., out, r) within buffers (..., num_values)."""
    views, start = {}, 0
    for name, matrix in matrices.items():
        size_a, size_b = _sizes(matrix, rank)
        a, b = torch.split(buffers[..., start : start + size_a + size_b], [size_a, size_b], dim=-1)
        leading = buffers.shape[:-1]
        views[name] = a.view(*leading, -1, matrix.width), b.view(*leading, -1, rank)
        start += size_a + size_b
    return views


def _sizes(matrix: Matrix, rank: int) -> tuple[int, int]:
    return len(matrix.num_rows) * rank * matrix.width, sum(matrix.num_rows) * rank
