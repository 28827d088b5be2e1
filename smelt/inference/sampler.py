"""Draw one token per row from logits, for all rows at once; knows no model and no cache.

Each row has its own settings and its own random number, and is computed so that other rows do not change its
answer. Shapes: B rows, V token ids, K candidates in falling order, N parts of a row with W ids each.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from smelt.errors import InvalidInput
from smelt.inference.adjustments import adjust
from smelt.inference.sequence import Alternatives, Sequence
from smelt.types import SamplingParams

MAX_LOGPROBS = 20  # alternatives at one place
MAX_LOGIT_BIASES = 1024
MAX_BIAS = 100.0
MAX_STOPS = 64
LEAST_TOP_P = 1e-9  # less than the most likely token has in any vocabulary, and more than fp32 rounds to 0
COLDEST = 1e-5  # below this temperature only the most likely token has a share that a number can hold
PART_WIDTH = 512  # a row is searched in parts: first which one, then where in it
MIN_CANDIDATES = 64
ROWS_AT_ONCE = 8  # that are drawn: their numbers stay in the processor's cache, and need no fresh memory
BELOW_ONE = 1 - 2**-24  # the largest fp32 number below 1: a draw of exactly 1 would lie behind the last token


class Drawn(NamedTuple):
    """A token, its log-probability, and the most likely tokens there with theirs, most likely first.

    Log-probabilities are of the model's own distribution: before biases, penalties, grammar, temperature and cuts.
    """

    token: int
    logprob: float
    top: Alternatives = ()


def check_params(params: SamplingParams, vocab_size: int) -> None:
    """InvalidInput where a setting is out of its range, with the value and the setting's name."""
    p = params
    limits = [
        ("max_tokens", p.max_tokens >= 1, "at least 1"),
        ("temperature", 0 <= p.temperature < float("inf"), "0 (greedy) or a positive number"),
        ("top_k", p.top_k is None or p.top_k >= 1, "at least 1, or None to keep every token"),
        ("top_p", 0 < p.top_p <= 1, "above 0 and at most 1"),
        ("min_p", 0 <= p.min_p <= 1, "between 0 and 1"),
        ("repetition_penalty", 0.01 <= p.repetition_penalty <= 100, "between 0.01 and 100 (1 changes nothing)"),
        ("presence_penalty", -2 <= p.presence_penalty <= 2, "between -2 and 2"),
        ("frequency_penalty", -2 <= p.frequency_penalty <= 2, "between -2 and 2"),
    ]
    for name, is_fine, range_ in limits:
        if not is_fine:
            raise InvalidInput(f"{name} must be {range_}, not {getattr(p, name)}", name)
    for count in (p.num_logprobs, p.num_prompt_logprobs):
        if count is not None and not 0 <= count <= MAX_LOGPROBS:
            raise InvalidInput(f"logprobs must be between 0 and {MAX_LOGPROBS}, not {count}", "logprobs")
    _check_stops(p.stop)
    _check_biases(p, vocab_size)


def _check_stops(stop: tuple[str, ...]) -> None:
    if "" in stop:
        raise InvalidInput("an empty stop string would stop every answer before it begins", "stop")
    if len(stop) > MAX_STOPS:
        raise InvalidInput(f"stop has {len(stop)} strings, and at most {MAX_STOPS} are allowed", "stop")


def _check_biases(params: SamplingParams, vocab_size: int) -> None:
    if len(params.logit_bias) > MAX_LOGIT_BIASES:
        message = f"logit_bias has {len(params.logit_bias)} entries, and at most {MAX_LOGIT_BIASES} are allowed"
        raise InvalidInput(message, "logit_bias")
    for token, bias in params.logit_bias:
        if not 0 <= token < vocab_size:
            message = f"logit_bias has token id {token}, but the model's are 0 to {vocab_size - 1}"
            raise InvalidInput(message, "logit_bias")
        if not -MAX_BIAS <= bias <= MAX_BIAS:
            message = f"logit_bias of token {token} must be between -{MAX_BIAS:g} and {MAX_BIAS:g}, not {bias}"
            raise InvalidInput(message, "logit_bias")


def sample(logits_BV: Tensor, sequences: list[Sequence]) -> list[Drawn]:
    """One token for each sequence from its row of fp32 logits, as its settings and its `uniform()` decide."""
    scores_BV = adjust(logits_BV, sequences)
    tokens_B = _argmax(scores_BV)
    num_at_once = ROWS_AT_ONCE if logits_BV.device.type == "cpu" else len(sequences)
    for num_candidates, rows in _drawn_alike(sequences, num_at_once):
        own = [sequences[row] for row in rows]
        scaled_BV = scores_BV[rows] / _column([s.params.temperature for s in own], scores_BV)
        if num_candidates:
            tokens_B[rows] = _draw_from_candidates(scaled_BV, own, num_candidates)
        else:
            tokens_B[rows] = _draw_from_all(scaled_BV, own)
    return rate(logits_BV, tokens_B, [s.params.num_logprobs or 0 for s in sequences])


def _drawn_alike(sequences: list[Sequence], num_at_once: int) -> Iterator[tuple[int, list[int]]]:
    """(number of candidates, rows) of those that are not greedy: a row's own settings choose, never its company's."""
    ways: dict[int, list[int]] = {}
    for row, sequence in enumerate(sequences):
        if sequence.params.temperature >= COLDEST:
            ways.setdefault(_num_candidates(sequence.params), []).append(row)
    for num_candidates, rows in ways.items():
        for start in range(0, len(rows), num_at_once):
            yield num_candidates, rows[start : start + num_at_once]


def rate(logits_BV: Tensor, tokens_B: Tensor, num_alternatives: list[int]) -> list[Drawn]:
    """What the model says of these tokens, one per row, and of so many alternatives of each."""
    highest_B = logits_BV.amax(dim=-1)
    # The highest share is 1/sum(exp(x - highest)). A sum over a single row would be cut among threads, and
    # differ from that over several rows; softmax is not.
    log_norm_B = highest_B - logits_BV.softmax(dim=-1).amax(dim=-1).log()
    logprobs = (logits_BV.gather(1, tokens_B[:, None])[:, 0] - log_norm_B).tolist()
    tops = _alternatives(logits_BV, log_norm_B, num_alternatives)
    drawn = zip(tokens_B.tolist(), logprobs, strict=True)
    return [Drawn(token, logprob, tops.get(row, ())) for row, (token, logprob) in enumerate(drawn)]


def _alternatives(logits_BV: Tensor, log_norm_B: Tensor, nums: list[int]) -> dict[int, Alternatives]:
    rows = [row for row, num in enumerate(nums) if num > 0]
    if not rows:
        return {}
    # Always as many, then fewer are kept: the order of equal ones may depend on how many are asked for.
    values_BK, ids_BK = logits_BV[rows].topk(min(MAX_LOGPROBS, logits_BV.shape[1]), dim=-1)
    logprobs_BK = values_BK - log_norm_B[rows][:, None]
    pairs = zip(rows, ids_BK.tolist(), logprobs_BK.tolist(), strict=True)
    return {row: tuple(zip(ids[: nums[row]], logprobs[: nums[row]], strict=True)) for row, ids, logprobs in pairs}


def _num_candidates(params: SamplingParams) -> int:
    """Of how many sorted candidates a row is drawn: a power of two that holds its top_k; 0 means of all tokens."""
    if params.top_k is None:
        return 0
    return max(MIN_CANDIDATES, 1 << (params.top_k - 1).bit_length())


def _draw_from_candidates(scaled_BV: Tensor, sequences: list[Sequence], num_candidates: int) -> Tensor:
    """The top_k most likely, of those the smallest head that holds top_p, of those none below min_p of the first."""
    params = [sequence.params for sequence in sequences]
    values_BK, ids_BK = scaled_BV.topk(min(num_candidates, scaled_BV.shape[1]), dim=-1)
    ranks = torch.arange(values_BK.shape[1], device=scaled_BV.device)
    top_k = torch.tensor([p.top_k for p in params], device=scaled_BV.device)[:, None]
    probs_BK = values_BK.masked_fill(ranks >= top_k, -torch.inf).softmax(dim=-1)
    mass_before_BK = probs_BK.cumsum(dim=-1) - probs_BK
    is_cut = (mass_before_BK >= _column([max(p.top_p, LEAST_TOP_P) for p in params], scaled_BV)) & (ranks > 0)
    is_cut |= probs_BK < _column([p.min_p for p in params], scaled_BV) * probs_BK[:, :1]
    places_B1, _ = _invert(_only(probs_BK, ~is_cut), _draws(sequences, scaled_BV))
    return ids_BK.gather(1, places_B1)[:, 0]


def _draw_from_all(scaled_BV: Tensor, sequences: list[Sequence]) -> Tensor:
    """As above without top_k: nothing is sorted. A token beyond top_p is rejected, and the draw goes on above it."""
    params = [sequence.params for sequence in sequences]
    probs_BV = scaled_BV.softmax(dim=-1)
    kept_BV = probs_BV
    if any(p.min_p for p in params):
        min_p_B1 = _column([p.min_p for p in params], probs_BV)
        kept_BV = _only(probs_BV, probs_BV >= min_p_B1 * probs_BV.amax(dim=-1, keepdim=True))
    tokens_B1, rest_B1 = _search(kept_BV, _draws(sequences, probs_BV))
    rows = torch.tensor([row for row, p in enumerate(params) if p.top_p < 1], dtype=torch.long, device=probs_BV.device)
    top_p_B1 = _column([max(p.top_p, LEAST_TOP_P) for p in params], probs_BV)
    while len(rows):
        beyond = _is_beyond(probs_BV[rows], tokens_B1[rows], top_p_B1[rows])
        rows = rows[beyond]
        # Those equal to a token beyond top_p, or lower, are beyond it too. What is left of the draw, the place
        # within the rejected token's share, is again uniform.
        above_BV = _only(kept_BV[rows], probs_BV[rows] > probs_BV[rows].gather(1, tokens_B1[rows]))
        tokens_B1[rows], rest_B1[rows] = _search(above_BV, rest_B1[rows])
    return tokens_B1[:, 0]


def _is_beyond(probs_BV: Tensor, tokens_B1: Tensor, top_p_B1: Tensor) -> Tensor:
    """(B,) whether the tokens that are more likely hold top_p already; equal ones are in or out together."""
    above_BV = _only(probs_BV, probs_BV > probs_BV.gather(1, tokens_B1))
    mass_above_B, mass_B = (_parts(x, 0.0).sum(dim=-1).sum(dim=-1) for x in (above_BV, probs_BV))
    return mass_above_B >= top_p_B1[:, 0] * mass_B


def _only(probs_BV: Tensor, is_kept_BV: Tensor) -> Tensor:
    """The probabilities, 0 where they are not kept: several times faster than masked_fill on CPUs."""
    return is_kept_BV.to(probs_BV.dtype).mul_(probs_BV)


def _argmax(scores_BV: Tensor) -> Tensor:
    """The first of the highest; by parts, because `amax` is twenty times faster than `argmax` on CPUs."""
    parts_BNW = _parts(scores_BV, -torch.inf)
    best_B1 = parts_BNW.amax(dim=-1).argmax(dim=-1, keepdim=True)
    return best_B1[:, 0] * PART_WIDTH + _part(parts_BNW, best_B1).argmax(dim=-1)


def _search(shares_BV: Tensor, draws_B1: Tensor) -> tuple[Tensor, Tensor]:
    """`_invert` of a whole row, by parts: first which one, then where in it."""
    parts_BNW = _parts(shares_BV, 0.0)
    part_B1, rest_B1 = _invert(parts_BNW.sum(dim=-1), draws_B1)
    place_B1, rest_B1 = _invert(_part(parts_BNW, part_B1), rest_B1)
    return part_B1 * PART_WIDTH + place_B1, rest_B1


def _invert(shares_BK: Tensor, draws_B1: Tensor) -> tuple[Tensor, Tensor]:
    """The first column whose cumulated share exceeds the draw (a column that has a share), and where in it that was.

    Both are (B, 1), and the second is again in [0, 1).
    """
    ends_BK = shares_BK.cumsum(dim=-1, dtype=draws_B1.dtype)
    targets_B1 = draws_B1 * ends_BK[:, -1:]
    places_B1 = (ends_BK <= targets_B1).sum(dim=-1, keepdim=True)
    share_B1 = shares_BK.gather(1, places_B1)
    rest_B1 = (targets_B1 - ends_BK.gather(1, places_B1) + share_B1) / share_B1
    return places_B1, rest_B1.clamp_(0, BELOW_ONE)


def _parts(x_BV: Tensor, filler: float) -> Tensor:
    """(B, V) -> (B, N, PART_WIDTH), filled up at the end."""
    if num_missing := -x_BV.shape[1] % PART_WIDTH:
        x_BV = F.pad(x_BV, (0, num_missing), value=filler)
    return x_BV.view(len(x_BV), x_BV.shape[1] // PART_WIDTH, PART_WIDTH)


def _part(parts_BNW: Tensor, index_B1: Tensor) -> Tensor:
    """(B, W): of each row the part with that index."""
    return parts_BNW[torch.arange(len(parts_BNW), device=parts_BNW.device), index_B1[:, 0]]


def _draws(sequences: list[Sequence], like: Tensor) -> Tensor:
    # Apple's GPUs have no float64.
    dtype = torch.float32 if like.device.type == "mps" else torch.float64
    draws = [min(sequence.uniform(), BELOW_ONE) for sequence in sequences]
    return torch.tensor(draws, dtype=dtype, device=like.device)[:, None]


def _column(values: list[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]
