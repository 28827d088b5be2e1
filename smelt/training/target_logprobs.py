"""Log-probabilities of targets without ever holding the logits of a whole batch; knows no loss and no session.

Logits come in tiles of a fixed number of rows (`fixed_tiles`), forward and once more backward, where tiles that no
gradient reaches are left out. What an adapter adds to them, and its gradient, is computed in pieces of ADAPTER_TILE
rows of one datum: so a datum gets the same bits whoever else is in the pass.

Shapes: N rows of hidden states, C width, V token ids, K targets of a row, r rank of an adapter.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from smelt.models.fixed_tiles import TILE_ROWS, filled
from smelt.training.packed_data import ADAPTER_TILE, Place


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
    found: tuple[Tensor, ...] = _TargetLogprobs.apply(hidden_NC, weight, tuple(wanted), anchor)  # type: ignore[no-untyped-call]
    return found


class _Piece(NamedTuple):
    """ADAPTER_TILE rows, of which the first are the tokens `own` of a datum."""

    datum: int
    rows: slice
    own: slice

    @property
    def num_own(self) -> int:
        return self.own.stop - self.own.start


class _TargetLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_NC: Tensor, weight: Tensor, wanted: tuple[Wanted, ...], _anchor: Tensor | None
    ) -> tuple[Tensor, ...]:
        logprobs = tuple(hidden_NC.new_empty(each.targets_NK.shape, dtype=torch.float32) for each in wanted)
        sums_N = hidden_NC.new_zeros(len(hidden_NC), dtype=torch.float32)
        for tile in _tiles(list(_pieces(wanted))):
            for piece, (logits, _) in zip(tile, _logits(hidden_NC, weight, wanted, tile), strict=True):
                sums = sums_N[piece.rows] = logits.logsumexp(dim=1)
                targets = wanted[piece.datum].targets_NK[piece.own]
                found = logits[: piece.num_own].gather(1, targets)
                logprobs[piece.datum][piece.own] = found - sums[: piece.num_own, None]
        ctx.weight, ctx.wanted = weight, wanted  # frozen, so that nothing has to watch over them
        ctx.save_for_backward(hidden_NC, sums_N)
        return logprobs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None, None]:
        hidden_NC, sums_N = ctx.saved_tensors
        weight: Tensor = ctx.weight
        wanted: tuple[Wanted, ...] = ctx.wanted
        g_NC = torch.zeros_like(hidden_NC)
        reached = [piece for piece in _pieces(wanted) if bool(gradients[piece.datum][piece.own].any())]
        for tile in _tiles(reached):
            g_tile = []
            for piece, (logits, hidden) in zip(tile, _logits(hidden_NC, weight, wanted, tile), strict=True):
                each = wanted[piece.datum]
                g_logits = _logits_gradient(logits, sums_N[piece.rows], gradients[piece.datum], each, piece)
                g_tile.append(g_logits.to(weight.dtype))
                if each.adapter is not None and hidden is not None:
                    g_NC[piece.rows] = _adapter_gradient(g_tile[-1], hidden_NC[piece.rows], hidden, each.adapter)
            if ctx.needs_input_grad[0]:
                g_rows = filled(torch.cat(g_tile)) @ weight
                for piece, g in zip(tile, torch.split(g_rows, ADAPTER_TILE), strict=False):
                    g_NC[piece.rows] += g
        return g_NC if ctx.needs_input_grad[0] else None, None, None, None


def _pieces(wanted: Sequence[Wanted]) -> Iterator[_Piece]:
    """Of one datum after the other, in their order: gradients are added up in it."""
    for datum, each in enumerate(wanted):
        place = each.place
        for start in range(0, place.num_tokens, ADAPTER_TILE):
            first = place.start + start
            own = slice(start, min(start + ADAPTER_TILE, place.num_tokens))
            yield _Piece(datum, slice(first, first + ADAPTER_TILE), own)


def _tiles(pieces: list[_Piece]) -> Iterator[list[_Piece]]:
    num = TILE_ROWS // ADAPTER_TILE
    return (pieces[start : start + num] for start in range(0, len(pieces), num))


def _logits(
    hidden_NC: Tensor, weight: Tensor, wanted: Sequence[Wanted], tile: Sequence[_Piece]
) -> list[tuple[Tensor, Tensor | None]]:
    """Of each piece the logits in fp32, rounded to the weights' dtype on the way as the sampler's, and scale A x."""
    rows = torch.cat([hidden_NC[piece.rows] for piece in tile])
    parts = torch.split(F.linear(filled(rows), weight)[: len(rows)], ADAPTER_TILE)
    found: list[tuple[Tensor, Tensor | None]] = []
    for piece, logits in zip(tile, parts, strict=True):
        adapter = wanted[piece.datum].adapter
        if adapter is None:
            found.append((logits.float(), None))
        else:
            hidden = F.linear(hidden_NC[piece.rows], adapter.a) * adapter.scale
            found.append(((logits + F.linear(hidden, adapter.b)).float(), hidden))
    return found


def _logits_gradient(logits: Tensor, sums: Tensor, gradient_NK: Tensor, wanted: Wanted, piece: _Piece) -> Tensor:
    """(ADAPTER_TILE, V): each target's share, less what the softmax takes. Nothing where the datum has no token."""
    g = gradient_NK[piece.own]
    shares = (logits - sums[:, None]).exp_()
    shares[piece.num_own :] = 0.0
    own = shares[: piece.num_own]
    own.mul_(-g.sum(dim=1, keepdim=True)).scatter_add_(1, wanted.targets_NK[piece.own], g)
    return shares


def _adapter_gradient(g_logits: Tensor, x: Tensor, hidden: Tensor, adapter: HeadAdapter) -> Tensor:
    """Add the gradients of A and B; what comes of them for x."""
    g_hidden = (g_logits @ adapter.b) * adapter.scale
    adapter.b_gradient.add_(g_logits.float().t() @ hidden.float())
    adapter.a_gradient.add_(g_hidden.float().t() @ x.float())
    return g_hidden @ adapter.a
