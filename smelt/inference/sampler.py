"""Draw one token per row from logits, for all rows at once; knows no model and no cache.

Each row has its own settings and its own random number, and is computed so that other rows do not change its
answer. Shapes: B rows, V token ids, K candidates in falling order.
"""

import math

import torch
from torch import Tensor

from smelt.errors import InvalidInput
from smelt.types import SamplingParams

BELOW_ONE = 1 - 2**-24  # the largest fp32 number below 1: a draw of exactly 1 would lie behind the last token


def check_params(params: SamplingParams) -> None:
    """InvalidInput where a setting is out of its range, with the value."""
    if params.max_tokens < 1:
        raise InvalidInput(f"max_tokens must be at least 1, not {params.max_tokens}")
    if not 0 <= params.temperature < math.inf:
        raise InvalidInput(f"temperature must be 0 (greedy) or a positive number, not {params.temperature}")
    if params.top_k is not None and params.top_k < 1:
        raise InvalidInput(f"top_k must be at least 1, or None to keep every token, not {params.top_k}")
    if not 0 < params.top_p <= 1:
        raise InvalidInput(f"top_p must be above 0 and at most 1, not {params.top_p}")
    if "" in params.stop:
        raise InvalidInput("an empty stop string would stop every answer before it begins")


def sample(logits_BV: Tensor, params: list[SamplingParams], uniforms: list[float]) -> tuple[Tensor, Tensor]:
    """(token ids (B,), log-probabilities (B,)) for fp32 logits; `uniforms` in [0, 1) decide where to draw.

    The log-probabilities are the model's own: before temperature, top-k and top-p.
    """
    tokens = logits_BV.argmax(dim=-1)
    whole = [row for row, p in enumerate(params) if p.temperature > 0 and not _is_cut(p)]
    cut = [row for row, p in enumerate(params) if p.temperature > 0 and _is_cut(p)]
    # Two ways of drawing, chosen by a row's own settings and never by its company's.
    for rows, draw in ((whole, _draw_from_all), (cut, _draw_from_candidates)):
        if rows:
            own = [params[row] for row in rows]
            heat = logits_BV.new_tensor([p.temperature for p in own])[:, None]
            draws = logits_BV.new_tensor([min(uniforms[row], BELOW_ONE) for row in rows])[:, None]
            tokens[rows] = draw(logits_BV[rows] / heat, own, draws)
    chosen = logits_BV.gather(1, tokens[:, None])[:, 0]
    return tokens, chosen - logits_BV.logsumexp(dim=-1)


def _is_cut(params: SamplingParams) -> bool:
    return params.top_k is not None or params.top_p < 1


def _draw_from_all(scaled_BV: Tensor, _params: list[SamplingParams], draws_B1: Tensor) -> Tensor:
    return _invert(scaled_BV.softmax(dim=-1), draws_B1)


def _draw_from_candidates(scaled_BV: Tensor, params: list[SamplingParams], draws_B1: Tensor) -> Tensor:
    """The top_k most likely tokens, and of those the smallest head that holds top_p of their probability."""
    num_ids = scaled_BV.shape[1]
    top_k = [min(p.top_k or num_ids, num_ids) for p in params]
    values_BK, ids_BK = scaled_BV.topk(max(top_k), dim=-1)
    ranks = torch.arange(values_BK.shape[1], device=scaled_BV.device)
    limits = torch.tensor(top_k, device=scaled_BV.device)[:, None]
    probs_BK = values_BK.masked_fill(ranks >= limits, -torch.inf).softmax(dim=-1)
    top_p = scaled_BV.new_tensor([p.top_p for p in params])[:, None]
    mass_before = probs_BK.cumsum(dim=-1) - probs_BK
    probs_BK = probs_BK.masked_fill((mass_before >= top_p) & (ranks > 0), 0.0)
    return ids_BK.gather(1, _invert(probs_BK, draws_B1)[:, None])[:, 0]


def _invert(probs_BK: Tensor, draws_B1: Tensor) -> Tensor:
    """The first column whose cumulated share exceeds the draw."""
    cumulated = probs_BK.cumsum(dim=-1)
    return (cumulated <= draws_B1 * cumulated[:, -1:]).sum(dim=-1)
