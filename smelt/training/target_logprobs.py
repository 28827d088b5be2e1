"""Log-probabilities of targets without ever holding the logits of a whole batch; knows no loss and no session.

Shapes: N rows of hidden states, C width, V token ids, K targets of a row.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from smelt.models.fixed_tiles import filled, tiles_of


def target_logprobs(hidden_NC: Tensor, weight: Tensor, targets_NK: Tensor) -> Tensor:
    """log p(target), (N, K) in fp32, with a head of (V, C); gradients pass to the hidden states alone.

    Computed in tiles of a fixed number of rows (`fixed_tiles`), forward and once more backward.
    """
    logprobs: Tensor = _TargetLogprobs.apply(hidden_NC, weight, targets_NK)  # type: ignore[no-untyped-call]
    return logprobs


class _TargetLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_NC: Tensor, weight: Tensor, targets_NK: Tensor) -> Tensor:
        logprobs_NK = hidden_NC.new_empty(targets_NK.shape, dtype=torch.float32)
        sums_N = hidden_NC.new_empty(len(hidden_NC), dtype=torch.float32)
        for tile in tiles_of(len(hidden_NC)):
            logits = _logits(hidden_NC[tile], weight)
            sums_N[tile] = logits.logsumexp(dim=1)
            logprobs_NK[tile] = logits.gather(1, targets_NK[tile]) - sums_N[tile, None]
        ctx.weight = weight  # frozen, so that nothing has to watch over it
        ctx.save_for_backward(hidden_NC, targets_NK, sums_N)
        return logprobs_NK

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (g_NK,) = gradients
        hidden_NC, targets_NK, sums_N = ctx.saved_tensors
        weight: Tensor = ctx.weight
        g_NC = torch.empty_like(hidden_NC)
        for tile in tiles_of(len(hidden_NC)):
            g = g_NK[tile]
            shares = (_logits(hidden_NC[tile], weight) - sums_N[tile, None]).exp_()
            g_logits = shares.mul_(-g.sum(dim=1, keepdim=True)).scatter_add_(1, targets_NK[tile], g)
            g_NC[tile] = (filled(g_logits.to(weight.dtype)) @ weight)[: tile.stop - tile.start]
        return g_NC, None, None


def _logits(hidden_NC: Tensor, weight: Tensor) -> Tensor:
    """In fp32, but rounded to the weights' dtype on the way, as the sampler's are."""
    return F.linear(filled(hidden_NC), weight)[: len(hidden_NC)].float()
