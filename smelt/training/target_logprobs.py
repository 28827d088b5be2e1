"""Log-probabilities of targets without ever holding the fp32 logits of a whole batch; knows no loss and no session.

Logits come some rows at a time, row by row alike (`fixed_tiles`), and once more in backward unless there was room to
keep them; rows that no gradient reaches are left out there. What an adapter adds to them, and its gradient, is computed
in pieces of ADAPTER_TILE rows of one datum: so a datum gets the same bits whoever else is in the pass.

Shapes: N rows of hidden states, C width, V token ids, K targets of a row, r rank of an adapter.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from smelt.models.fixed_tiles import row_by_row
from smelt.models.kernels import training_kernels
from smelt.training.packed_data import ADAPTER_TILE, Place

MAX_ROWS = 256  # whose logits are computed at once: the weights are read once for them
MAX_KEPT_BYTES = 256 * 2**20  # of logits, between forward and backward


@dataclass(frozen=True, slots=True, eq=False)
class HeadAdapter:
    """scale B A of the unembedding, A (r, C) and B (V, r) in its dtype, and where their gradients are added (fp32)."""

    a: Tensor
    b: Tensor
    scale: float
    a_gradient: Tensor
    b_gradient: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Wanted:
    """The targets of a datum, (its tokens, K), and what its session adds to the unembedding."""

    place: Place
    targets_NK: Tensor
    adapter: HeadAdapter | None = None


def target_logprobs(
    hidden_NC: Tensor, weight: Tensor, wanted: Sequence[Wanted], anchor: Tensor | None = None
) -> tuple[Tensor, ...]:
    """log p(target) of each datum, in fp32, with a head of (V, C).

    Gradients pass to the hidden states, and of adapters into their place, datum by datum. `anchor`: something that
    wants a gradient, for where the hidden states do not.
    """
    num_kept = MAX_KEPT_BYTES // (MAX_ROWS * weight.shape[0] * weight.itemsize) if torch.is_grad_enabled() else 0
    found: tuple[Tensor, ...] = _TargetLogprobs.apply(hidden_NC, weight, tuple(wanted), num_kept, anchor)  # type: ignore[no-untyped-call]
    return found


class _Piece(NamedTuple):
    """Rows from `start`, of which the first are tokens of a datum, from `own_start`."""

    datum: int
    start: int
    num_rows: int
    own_start: int
    num_own: int

    @property
    def rows(self) -> slice:
        return slice(self.start, self.start + self.num_rows)

    @property
    def own(self) -> slice:
        return slice(self.own_start, self.own_start + self.num_own)


class _Logits(NamedTuple):
    """(rows, V) in the weights' dtype, and scale A x where an adapter has a part in them."""

    values: Tensor
    hidden: Tensor | None


class _TargetLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_NC: Tensor, weight: Tensor, wanted: tuple[Wanted, ...], num_kept: int, _anchor: Tensor | None
    ) -> tuple[Tensor, ...]:
        kept: dict[_Piece, _Logits] = {}
        logprobs = tuple(hidden_NC.new_empty(each.targets_NK.shape, dtype=torch.float32) for each in wanted)
        sums_N = hidden_NC.new_zeros(len(hidden_NC), dtype=torch.float32)
        for number, tile in enumerate(_tiles(list(_pieces(wanted)))):
            for piece, found_logits in zip(tile, _logits(hidden_NC, weight, wanted, tile), strict=True):
                if number < num_kept:
                    kept[piece] = found_logits
                logits = found_logits.values
                sums = sums_N[piece.rows] = _log_sums(logits)
                targets = wanted[piece.datum].targets_NK[piece.own]
                found = logits[: piece.num_own].gather(1, targets).float()
                logprobs[piece.datum][piece.own] = found - sums[: piece.num_own, None]
        ctx.weight, ctx.wanted, ctx.kept = weight, wanted, kept  # frozen, so that nothing has to watch over them
        ctx.save_for_backward(hidden_NC, sums_N)
        return logprobs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        hidden_NC, sums_N = ctx.saved_tensors
        weight: Tensor = ctx.weight
        wanted: tuple[Wanted, ...] = ctx.wanted
        g_NC = torch.zeros_like(hidden_NC)
        reached = [piece for piece in _pieces(wanted) if bool(gradients[piece.datum][piece.own].any())]
        g_logits = weight.new_empty(MAX_ROWS, len(weight))
        for tile in _tiles(reached):
            is_kept = all(piece in ctx.kept for piece in tile)
            found = [ctx.kept.pop(p) for p in tile] if is_kept else _logits(hidden_NC, weight, wanted, tile)
            sizes = [piece.num_rows for piece in tile]
            g_tile = g_logits[: sum(sizes)]
            for piece, (logits, hidden), g in zip(tile, found, torch.split(g_tile, sizes), strict=True):
                each = wanted[piece.datum]
                _write_gradient(logits, sums_N[piece.rows], gradients[piece.datum], each, piece, g)
                if each.adapter is not None and hidden is not None:
                    g_NC[piece.rows] = _adapter_gradient(g, hidden_NC[piece.rows], hidden, each.adapter)
            if ctx.needs_input_grad[0]:
                for piece, g in zip(tile, torch.split(row_by_row(g_tile, weight), sizes), strict=True):
                    g_NC[piece.rows] += g
        return g_NC if ctx.needs_input_grad[0] else None, None, None, None, None


def _pieces(wanted: Sequence[Wanted]) -> Iterator[_Piece]:
    """Of one datum after the other, in their order: gradients are added up in it."""
    for datum, each in enumerate(wanted):
        place = each.place
        for start in range(0, place.num_tokens, ADAPTER_TILE):
            num_rows, num_own = (min(ADAPTER_TILE, num - start) for num in (place.num_rows, place.num_tokens))
            yield _Piece(datum, place.start + start, num_rows, start, num_own)


def _tiles(pieces: list[_Piece]) -> Iterator[list[_Piece]]:
    num = MAX_ROWS // ADAPTER_TILE
    return (pieces[start : start + num] for start in range(0, len(pieces), num))


def _logits(hidden_NC: Tensor, weight: Tensor, wanted: Sequence[Wanted], tile: Sequence[_Piece]) -> list[_Logits]:
    """Of each piece, rounded to the weights' dtype as the sampler's are."""
    rows = torch.cat([hidden_NC[piece.rows] for piece in tile])
    parts = torch.split(row_by_row(rows, weight.t()), [piece.num_rows for piece in tile])
    found: list[_Logits] = []
    for piece, logits in zip(tile, parts, strict=True):
        adapter = wanted[piece.datum].adapter
        if adapter is None:
            found.append(_Logits(logits, None))
        else:
            hidden = F.linear(hidden_NC[piece.rows], adapter.a) * adapter.scale
            found.append(_Logits(logits + F.linear(hidden, adapter.b), hidden))
    return found


def _log_sums(logits: Tensor) -> Tensor:
    fast = training_kernels(logits)
    return logits.float().logsumexp(dim=1) if fast is None else fast.log_sums(logits.contiguous())


def _write_gradient(
    logits: Tensor, sums: Tensor, gradient_NK: Tensor, wanted: Wanted, piece: _Piece, to: Tensor
) -> None:
    """(ADAPTER_TILE, V): each target's share, less what the softmax takes. Nothing where the datum has no token."""
    g, targets = gradient_NK[piece.own], wanted.targets_NK[piece.own]
    own = to[: piece.num_own]
    to[piece.num_own :] = 0.0
    if (fast := training_kernels(logits)) is not None:
        fast.targets_back(logits[: piece.num_own].contiguous(), sums, targets.contiguous(), g.contiguous(), own)
        return
    shares = (logits[: piece.num_own].float() - sums[: piece.num_own, None]).exp_()
    own.copy_(shares.mul_(-g.sum(dim=1, keepdim=True)).scatter_add_(1, targets, g))


def _adapter_gradient(g_logits: Tensor, x: Tensor, hidden: Tensor, adapter: HeadAdapter) -> Tensor:
    """Add the gradients of A and B; what comes of them for x."""
    g_hidden = (g_logits @ adapter.b) * adapter.scale
    adapter.b_gradient.add_(g_logits.float().t() @ hidden.float())
    adapter.a_gradient.add_(g_hidden.float().t() @ x.float())
    return g_hidden @ adapter.a
