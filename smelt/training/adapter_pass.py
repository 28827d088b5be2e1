"""LoRA adapters of several sessions in one forward and backward pass; knows no loss, no optimizer and no files.

    y += scale B (A x)        for each datum by the adapter of its session

A kernel of ours takes each datum by itself. Where there is none, all tiles of ADAPTER_TILE tokens are multiplied at
once, each by its own adapter's factors. Gradients of the factors are summed in fp32 and added up datum by datum, in
their order: so an adapter's gradient is the same bits whoever else is in the pass.

Shapes: n tiles of T tokens, S adapters of one rank, P parts of a fused matrix, R their rank.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from smelt.models.adapter_folders import UNEMBEDDING, Matrix
from smelt.models.decoder import Decoder
from smelt.models.fixed_tiles import row_by_row, tiled_product
from smelt.models.kernels import training_kernels
from smelt.models.training_kernels import Datums, StackedFactors, TrainingKernels
from smelt.training.factor_buffer import factor_views
from smelt.training.packed_data import ADAPTER_TILE, Place

# Of each fused matrix the pairs (A (r, in), B (out, r)) of its parts.
Pairs = Mapping[str, Sequence[tuple[Tensor, Tensor]]]


@dataclass(frozen=True, slots=True)
class Member:
    """An adapter that takes part: what it changes, its `factor_buffer`, where gradients go (fp32), and its datums."""

    matrices: Mapping[str, Matrix]
    rank: int
    values: Tensor
    gradients: Pairs
    scale: float
    places: tuple[Place, ...]


class AdapterPass:
    """The factors of all members, stacked; their batch must be the row that the places are of."""

    def __init__(self, members: Sequence[Member], model: Decoder) -> None:
        self._stacks: dict[int, list[_Stack]] = {}  # by the identity of the weights that they add to
        for alike in _alike(members):
            for name, stack in _stacks(alike, model.embedding.weight):
                self._stacks.setdefault(id(model.get_submodule(name).weight), []).append(stack)
        # The model is frozen: without something that wants a gradient, no backward pass would come by.
        self.anchor = torch.zeros((), device=model.embedding.weight.device, requires_grad=True)

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """What `fixed_tiles` is to compute: x W^T + b, and what the adapters add to it."""
        stacks = self._stacks.get(id(weight))
        if stacks is None:
            return tiled_product(x, weight, bias)
        x_NC = x.flatten(0, -2)
        if (fast := training_kernels(x_NC)) is not None:
            y_NO = _Adapted.apply(x_NC, weight, bias, self.anchor, stacks, fast)  # type: ignore[no-untyped-call]
        else:
            y_NO = tiled_product(x_NC, weight, bias)
            for stack in stacks:
                y_NO = _AddByTorch.apply(x_NC, y_NO, self.anchor, stack)  # type: ignore[no-untyped-call]
        return y_NO.view(*x.shape[:-1], -1)


def _alike(members: Sequence[Member]) -> list[list[Member]]:
    """Those of one rank that change the same: filled up to a larger one, a product would be summed in another order."""
    groups: dict[tuple[int, tuple[str, ...]], list[Member]] = {}
    for member in members:
        groups.setdefault((member.rank, tuple(member.matrices)), []).append(member)
    return list(groups.values())


def _stacks(members: Sequence[Member], weight: Tensor) -> list[tuple[str, "_Stack"]]:
    """The fused matrices of members that are alike, in the dtype of a weight and on its device."""
    first, datums = members[0], _Rows(members)
    values = torch.empty(len(members), len(first.values), dtype=weight.dtype, device=weight.device)
    for own, member in zip(values, members, strict=True):
        own.copy_(member.values)
    scales = torch.tensor([member.scale for member in members], device=weight.device)  # fp32, as the engine's
    return [
        (name, _Stack(datums, name, a, b, scales))
        for name, (a, b) in factor_views(values, first.matrices, first.rank).items()
        if name != UNEMBEDDING
    ]


class _Rows:
    """Where the datums of members that are alike lie in the row; each member is a slot of their stacks."""

    def __init__(self, members: Sequence[Member]) -> None:
        self.members = members
        places = [(place.start, place.num_tokens, slot) for slot, m in enumerate(members) for place in m.places]
        self.datums = Datums(*torch.tensor(places).t().contiguous().unbind())

    @cached_property
    def tiles(self) -> "_Tiles":
        """For torch."""
        return _Tiles(self.members)


class _Tiles:
    """The tiles of members in the row, and whose each of them is.

    A tile never comes alone, for that would be a product of another kind: then another one keeps it company, and what
    comes of that is dropped.
    """

    def __init__(self, members: Sequence[Member]) -> None:
        owned = [(t, slot) for slot, m in enumerate(members) for place in m.places for t in _tiles_of(place)]
        self.num_tiles = len(owned)
        if len(owned) == 1:
            owned.append((owned[0][0] ^ 1, 0))  # rows have an even number of tiles
        self.tiles, self.slots = torch.tensor(owned, device=members[0].values.device).unbind(1)
        self._is_in_order = [tile for tile, _ in owned] == list(range(len(owned)))
        self.firsts = _firsts(members)

    def own(self, rows_NC: Tensor) -> Tensor:
        """The members' tiles of a row, (n, T, C): the row itself where they are all of it."""
        tiles = rows_NC.reshape(-1, ADAPTER_TILE, rows_NC.shape[1])
        return tiles if self._is_all_of(tiles) else tiles[self.tiles]

    def added(self, rows_NC: Tensor, tiles: Tensor) -> Tensor:
        """The row with what its tiles add to it."""
        all_tiles = rows_NC.view(-1, ADAPTER_TILE, rows_NC.shape[1])
        if self._is_all_of(all_tiles):
            return (all_tiles + tiles).view_as(rows_NC)
        num = self.num_tiles
        return all_tiles.index_add(0, self.tiles[:num], tiles[:num]).view_as(rows_NC)

    def spread(self, tiles: Tensor, num_rows: int) -> Tensor:
        """A row of zeros but for these tiles."""
        if self._is_in_order and num_rows == self.num_tiles * ADAPTER_TILE == len(self.tiles) * ADAPTER_TILE:
            return tiles.flatten(0, 1)
        num, row = self.num_tiles, tiles.new_zeros(num_rows // ADAPTER_TILE, *tiles.shape[1:])
        return row.index_copy_(0, self.tiles[:num], tiles[:num]).flatten(0, 1)

    def _is_all_of(self, tiles: Tensor) -> bool:
        return self._is_in_order and len(tiles) == len(self.tiles) == self.num_tiles


class _Stack:
    """One fused matrix of the members of `rows`: `a` (S, P R, in), `b` (S, out, R), `scales` (S,)."""

    def __init__(self, rows: _Rows, name: str, a: Tensor, b: Tensor, scales: Tensor) -> None:
        first = rows.members[0]
        self.rows, self.name, self.num_rows = rows, name, list(first.matrices[name].num_rows)
        self.rank, self.a, self.b, self.scales = first.rank, a, b, scales
        self.factors = StackedFactors(a, b, scales, torch.tensor(self.num_rows))

    def gradient_addresses(self) -> Tensor:
        """Where the members' gradients lie, as the kernel takes them."""
        found = [
            [each.data_ptr() for each in pair] for member in self.rows.members for pair in member.gradients[self.name]
        ]
        return torch.tensor(found)

    def scaled(self, hidden: Tensor) -> Tensor:
        """What lies between A and B, (n, T, P R), by the scale of each tile's adapter."""
        return (hidden * self.scales[self.rows.tiles.slots][:, None, None]).to(hidden.dtype)

    def add_gradients(self, a: Tensor, b: Tensor) -> None:
        """Add up what the tiles give, (n, P R, in) and (n, out, R), datum by datum."""
        for member, firsts in zip(self.rows.members, self.rows.tiles.firsts, strict=True):
            starts = [sum(self.num_rows[:part]) for part in range(len(self.num_rows))]
            for part, (own_a, own_b) in enumerate(member.gradients[self.name]):
                ranks = slice(part * self.rank, (part + 1) * self.rank)
                rows = slice(starts[part], starts[part] + self.num_rows[part])
                for first, end in firsts:
                    own_a += a[first:end, ranks].sum(dim=0)
                    own_b += b[first:end, rows].sum(dim=0)


def _tiles_of(place: Place) -> range:
    return range(place.start // ADAPTER_TILE, (place.start + place.num_rows) // ADAPTER_TILE)


def _firsts(members: Sequence[Member]) -> list[list[tuple[int, int]]]:
    """Of each member's datums where their tiles begin and end, counted among those of all members."""
    found: list[list[tuple[int, int]]] = []
    start = 0
    for member in members:
        found.append([])
        for place in member.places:
            found[-1].append((start, start + len(_tiles_of(place))))
            start = found[-1][-1][1]
    return found


class _Adapted(torch.autograd.Function):
    """Product and adapters at once: what adapters add goes where the product lies, on both ways."""

    @staticmethod
    def forward(
        ctx: Any,
        x_NC: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        _anchor: Tensor,
        stacks: Sequence[_Stack],
        fast: TrainingKernels,
    ) -> Tensor:
        x_NC = x_NC.contiguous()
        y_NO = row_by_row(x_NC, weight.t(), bias)
        hiddens = [fast.add_adapters(x_NC, y_NO, stack.factors, stack.rows.datums) for stack in stacks]
        ctx.weight, ctx.stacks, ctx.fast = weight, stacks, fast
        ctx.save_for_backward(x_NC, *hiddens)
        return y_NO

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        g_NO, (x_NC, *hiddens) = gradients[0].contiguous(), ctx.saved_tensors
        is_wanted = ctx.needs_input_grad[0]
        g_NC = row_by_row(g_NO, ctx.weight) if is_wanted else torch.zeros_like(x_NC)
        for stack, hidden in zip(ctx.stacks, hiddens, strict=True):
            inputs = x_NC, g_NO, hidden, stack.factors, stack.rows.datums
            ctx.fast.add_adapters_back(*inputs, stack.gradient_addresses(), g_NC)
        return g_NC if is_wanted else None, None, None, None, None, None


class _AddByTorch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NC: Tensor, y_NO: Tensor, _anchor: Tensor, stack: _Stack) -> Tensor:
        x = stack.rows.tiles.own(x_NC)
        hidden = stack.scaled(torch.bmm(x, stack.a[stack.rows.tiles.slots].transpose(1, 2)))
        parts = zip(
            torch.split(hidden, stack.rank, dim=2),
            torch.split(stack.b[stack.rows.tiles.slots], stack.num_rows, dim=1),
            strict=True,
        )
        added = torch.cat([torch.bmm(h, b.transpose(1, 2)) for h, b in parts], dim=2)
        ctx.stack = stack
        ctx.save_for_backward(x, hidden)
        return stack.rows.tiles.added(y_NO, added)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (g_NO,) = gradients
        stack: _Stack = ctx.stack
        x, hidden = ctx.saved_tensors
        g = stack.rows.tiles.own(g_NO)
        g_parts = torch.split(g, stack.num_rows, dim=2)
        b_parts = torch.split(stack.b[stack.rows.tiles.slots], stack.num_rows, dim=1)
        g_hidden = torch.cat([torch.bmm(g_part, b) for g_part, b in zip(g_parts, b_parts, strict=True)], dim=2)
        g_hidden = stack.scaled(g_hidden)
        pairs = zip(g_parts, torch.split(hidden, stack.rank, dim=2), strict=True)
        b_gradients = [torch.bmm(g_part.transpose(1, 2).float(), h.float()) for g_part, h in pairs]
        a_gradients = torch.bmm(g_hidden.transpose(1, 2).float(), x.float())
        stack.add_gradients(a_gradients, torch.cat(b_gradients, dim=1))
        g_x = torch.bmm(g_hidden, stack.a[stack.rows.tiles.slots])
        return stack.rows.tiles.spread(g_x, len(g_NO)), g_NO, None, None
