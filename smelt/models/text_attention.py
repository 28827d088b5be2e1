"""Attention within whole texts and its gradient, by our own kernels where they are; knows no model and no batch.

Shapes: N tokens of texts one after the other, H heads of queries, G heads of keys, D width of a head.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from smelt.models.kernels import training_kernels
from smelt.models.layers import Attend
from smelt.models.training_kernels import Texts, TrainingKernels


def attend_row(texts: Texts, by_torch: Callable[[], Attend]) -> Attend:
    """How the tokens of one row attend within its texts; `by_torch` makes what does it where there are no kernels."""
    otherwise: list[Attend] = []

    def attend(layer: int, q_1NHD: Tensor, k_1NGD: Tensor, v_1NGD: Tensor) -> Tensor:
        if (fast := training_kernels(q_1NHD)) is not None:
            return attend_texts(fast, q_1NHD[0], k_1NGD[0], v_1NGD[0], texts)[None]
        if not otherwise:
            otherwise.append(by_torch())
        return otherwise[0](layer, q_1NHD, k_1NGD, v_1NGD)

    return attend


def attend_texts(fast: TrainingKernels, q_NHD: Tensor, k_NGD: Tensor, v_NGD: Tensor, texts: Texts) -> Tensor:
    """softmax(q k^T / sqrt(D)) v within each text, (N, H, D)."""
    out: Tensor = _Attention.apply(*map(_in_one_piece, (q_NHD, k_NGD, v_NGD)), texts, fast)  # type: ignore[no-untyped-call]
    return out


def _in_one_piece(x_NHD: Tensor) -> Tensor:
    """The heads of each token one after the other; tokens may be further apart."""
    return x_NHD if x_NHD.stride()[1:] == (x_NHD.shape[2], 1) else x_NHD.contiguous()


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, texts: Texts, fast: TrainingKernels) -> Tensor:
        out, log_sums = fast.attend_texts(q, k, v, texts)
        ctx.save_for_backward(q, k, v, out, log_sums)
        ctx.texts, ctx.fast = texts, fast
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, out, log_sums = ctx.saved_tensors
        g = gradients[0].contiguous()
        return *ctx.fast.attend_texts_back(tuple(inputs), ctx.texts, (out, log_sums), g), None, None
