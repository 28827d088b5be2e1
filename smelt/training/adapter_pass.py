"""LoRA adapters of several sessions in one forward and backward pass; knows no loss, no optimizer and no files.

    y += scale B (A x)        for each datum by the adapter of its session

A kernel of ours takes each datum by itself. Where there is none, all tiles of ADAPTER_TILE tokens are multiplied at
once, each by its own adapter's factors. Gradients of the factors are summed in fp32 and added up datum by datum, in
their order: so an adapter's gradient is the same bits whoever else is in the pass.

Shapes: n tiles of T tokens, S adapters of one rank, P parts of a fused matrix, R their rank.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from smelt.models.adapter_folders import UNEMBEDDING, Matrix
from smelt.models.decoder import Decoder
from smelt.models.kernels import training_kernels
from smelt.models.training_kernels import Datums, StackedFactors, TrainingKernels
from smelt.training.packed_data import ADAPTER_TILE, Place

# Of each fused matrix the pairs (A (r, in), B (out, r)) of its parts: the factors, or their gradients.
Pairs = Mapping[str, Sequence[tuple[Tensor, Tensor]]]


@dataclass(frozen=True, slots=True)
class Member:
    """An adapter that takes part: its factors, where their gradients go (fp32), and its datums in order."""

    rank: int
    factors: Pairs
    gradients: Pairs
    scale: float
    places: tuple[Place, ...]


class AdapterPass:
    """The factors of all members, stacked; `applied` to the blocks of a model while they compute."""

    def __init__(self, members: Sequence[Member], matrices: Mapping[str, Matrix], model: Decoder) -> None:
        weight = model.embedding.weight
        self._model = model
        self._stacks = [
            (name, _Stack(rows, name, matrix, weight.dtype, weight.device))
            for rows in (_Rows(own, weight.device) for own in _by_rank(members))
            for name, matrix in matrices.items()
            if name != UNEMBEDDING and any(name in member.factors for member in rows.members)
        ]
        # The model is frozen: without something that wants a gradient, no backward pass would come by.
        self.anchor = torch.zeros((), device=weight.device, requires_grad=True)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model computes with the adapters; its batch must be the row that the places are of."""
        handles = [
            self._model.get_submodule(name).register_forward_hook(self._hook(stack)) for name, stack in self._stacks
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, stack: "_Stack") -> Any:
        def add(_module: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor:
            x_NC, y_NO = args[0].flatten(0, -2), y.flatten(0, -2)
            fast = training_kernels(x_NC)
            adding = _AddByTorch if fast is None else _Add
            added: Tensor = adding.apply(x_NC, y_NO, self.anchor, stack, fast)  # type: ignore[no-untyped-call]
            return added.view_as(y)

        return add


def _by_rank(members: Sequence[Member]) -> list[list[Member]]:
    """Those of one rank together: filled up to a larger one, a product would be summed in another order."""
    groups: dict[int, list[Member]] = {}
    for member in members:
        groups.setdefault(member.rank, []).append(member)
    return list(groups.values())


class _Rows:
    """Where the datums of members of one rank lie in the row; each member is a slot of their stacks.

    For torch: `tiles` are theirs in the row, and `slots` say whose each of them is. A tile never comes alone, for that
    would be a product of another kind: then another one keeps it company, and what comes of that is dropped.
    """

    def __init__(self, members: Sequence[Member], device: torch.device) -> None:
        self.members = members
        places = [(place.start, place.num_tokens, slot) for slot, m in enumerate(members) for place in m.places]
        self.datums = Datums(*torch.tensor(places).t().contiguous().unbind())
        owned = [(t, slot) for slot, m in enumerate(members) for place in m.places for t in _tiles_of(place)]
        self.num_tiles = len(owned)
        if len(owned) == 1:
            owned.append((owned[0][0] ^ 1, 0))  # rows have an even number of tiles
        self.tiles, self.slots = torch.tensor(owned, device=device).unbind(1)
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

    def __init__(self, rows: _Rows, name: str, matrix: Matrix, dtype: torch.dtype, device: torch.device) -> None:
        members = rows.members
        self.rows, self.name, self.num_rows = rows, name, list(matrix.num_rows)
        self.rank = members[0].rank
        self.a = torch.zeros(len(members), len(self.num_rows) * self.rank, matrix.width, dtype=dtype, device=device)
        self.b = torch.zeros(len(members), sum(self.num_rows), self.rank, dtype=dtype, device=device)
        for slot, member in enumerate(members):
            if pairs := member.factors.get(name):
                self.a[slot] = torch.cat([a for a, _ in pairs])
                self.b[slot] = torch.cat([b for _, b in pairs])
        self.scales = torch.tensor([member.scale for member in members], device=device)  # fp32, as the engine's
        self.factors = StackedFactors(self.a, self.b, self.scales, torch.tensor(self.num_rows))

    def gradient_addresses(self) -> Tensor:
        """Where the members' gradients lie, as the kernel takes them."""
        found = [
            [each.data_ptr() for each in pair]
            for member in self.rows.members
            for pair in member.gradients.get(self.name, [()] * len(self.num_rows))
        ]
        return torch.tensor([pair or [0, 0] for pair in found])

    def scaled(self, hidden: Tensor) -> Tensor:
        """What lies between A and B, (n, T, P R), by the scale of each tile's adapter."""
        return (hidden * self.scales[self.rows.slots][:, None, None]).to(hidden.dtype)

    def add_gradients(self, a: Tensor, b: Tensor) -> None:
        """Add up what the tiles give, (n, P R, in) and (n, out, R), datum by datum."""
        for member, firsts in zip(self.rows.members, self.rows.firsts, strict=True):
            starts = [sum(self.num_rows[:part]) for part in range(len(self.num_rows))]
            for part, (own_a, own_b) in enumerate(member.gradients.get(self.name, ())):
                ranks = slice(part * self.rank, (part + 1) * self.rank)
                rows = slice(starts[part], starts[part] + self.num_rows[part])
                for first, end in firsts:
                    own_a += a[first:end, ranks].sum(dim=0)
                    own_b += b[first:end, rows].sum(dim=0)


def _tiles_of(place: Place) -> range:
    return range(place.first_tile, place.end_tile)


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


class _Add(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NC: Tensor, y_NO: Tensor, _anchor: Tensor, stack: _Stack, fast: TrainingKernels) -> Tensor:
        x_NC, y_NO = x_NC.contiguous(), y_NO.contiguous()
        out, hidden = fast.lora_pass(x_NC, y_NO, stack.factors, stack.rows.datums)
        ctx.stack, ctx.fast = stack, fast
        ctx.save_for_backward(x_NC, hidden)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        g_NO, stack = gradients[0].contiguous(), ctx.stack
        x_NC, hidden = ctx.saved_tensors
        g_x = ctx.fast.lora_pass_back(x_NC, g_NO, hidden, stack.factors, stack.rows.datums, stack.gradient_addresses())
        return g_x, gradients[0], None, None, None


class _AddByTorch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NC: Tensor, y_NO: Tensor, _anchor: Tensor, stack: _Stack, _fast: None) -> Tensor:
        x = stack.rows.own(x_NC)
        hidden = stack.scaled(torch.bmm(x, stack.a[stack.rows.slots].transpose(1, 2)))
        parts = zip(
            torch.split(hidden, stack.rank, dim=2),
            torch.split(stack.b[stack.rows.slots], stack.num_rows, dim=1),
            strict=True,
        )
        added = torch.cat([torch.bmm(h, b.transpose(1, 2)) for h, b in parts], dim=2)
        ctx.stack = stack
        ctx.save_for_backward(x, hidden)
        return stack.rows.added(y_NO, added)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (g_NO,) = gradients
        stack: _Stack = ctx.stack
        x, hidden = ctx.saved_tensors
        g = stack.rows.own(g_NO)
        g_parts = torch.split(g, stack.num_rows, dim=2)
        b_parts = torch.split(stack.b[stack.rows.slots], stack.num_rows, dim=1)
        g_hidden = torch.cat([torch.bmm(g_part, b) for g_part, b in zip(g_parts, b_parts, strict=True)], dim=2)
        g_hidden = stack.scaled(g_hidden)
        pairs = zip(g_parts, torch.split(hidden, stack.rank, dim=2), strict=True)
        b_gradients = [torch.bmm(g_part.transpose(1, 2).float(), h.float()) for g_part, h in pairs]
        a_gradients = torch.bmm(g_hidden.transpose(1, 2).float(), x.float())
        stack.add_gradients(a_gradients, torch.cat(b_gradients, dim=1))
        g_x = torch.bmm(g_hidden, stack.a[stack.rows.slots])
        return stack.rows.spread(g_x, len(g_NO)), g_NO, None, None, None
