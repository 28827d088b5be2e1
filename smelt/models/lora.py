"""LoRA adapters of one model, stacked, so that one pass serves rows of many; knows no files and no requests.

    y += scale_s B_s (A_s x)        for the rows of slot s; rows without an adapter take no part

The factors of all slots lie in one tensor per matrix. Rows are laid out in tiles of one slot each, and all tiles are
multiplied at once. Gradients pass through the stacked factors, each slot's into its own part.

A few rows on a CPU are left to our own kernel, which reads each factor once and where it lies.

Shapes: N rows of a batch, S slots, P parts of a fused matrix (q, k, v), R rank, n tiles of T rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from smelt.models.adapter_folders import UNEMBEDDING, Adapter, Factors, Matrix, matrices_of
from smelt.models.batch import NO_ADAPTER, Batch
from smelt.models.decoder import Decoder
from smelt.models.kernels import Kernels, kernels
from smelt.models.recording import current_recording

# What a tile costs besides its rows, in rows: to read its slot's factors, and to copy them first.
READ_COST, COPY_COST = 4, 24
RANK_STEP = 8  # ranks are filled up to a multiple: odd widths are slow
INITIAL_SLOTS = 4
MOST_ROWS = 64  # that our kernel takes; torch is faster from there on


class Groups(NamedTuple):
    """The rows that have adapters, sorted by slot; all int64 and on the CPU."""

    order: Tensor  # (M,) rows
    starts: Tensor  # (G + 1,) where in `order` each slot's begin, and the end
    slots: Tensor  # (G,)


@dataclass(frozen=True, slots=True)
class Tiles:
    """Where the rows that have adapters go.

    `slots` picks the factors of each tile. `rows` None: tile by tile these are all rows in order, without a gap.
    """

    groups: Groups
    slots: slice | Tensor  # a range of slots with one tile each, or the slot of each tile (n,)
    grid: Tensor  # (n, T) the row in each place; places left over repeat a row
    rows: Tensor | None  # (M,) the rows that have an adapter
    places: Tensor | None  # (M,) where in the flat grid they are


def lay_out(slots: NDArray[np.int64], device: torch.device) -> Tiles | None:
    """Tiles for rows with these slots (NO_ADAPTER: none); None where no row has an adapter."""
    rows = np.flatnonzero(slots != NO_ADAPTER)
    if not len(rows):
        return None
    rows = rows[np.argsort(slots[rows], kind="stable")]
    used, counts = np.unique(slots[rows], return_counts=True)
    num_in_tile, is_range = _tile_size(used, counts)
    num_tiles = np.ones_like(used) if is_range else -(-counts // num_in_tile)
    firsts = used - used[0] if is_range else np.cumsum(num_tiles) - num_tiles
    within = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    places = np.repeat(firsts * num_in_tile, counts) + within
    grid = np.full(int(firsts[-1] + num_tiles[-1]) * num_in_tile, rows[0])
    grid[places] = rows
    is_whole = len(grid) == len(slots) and bool((grid == np.arange(len(slots))).all())
    starts = np.append(np.cumsum(counts) - counts, len(rows))
    return Tiles(
        groups=Groups(*map(torch.from_numpy, (rows, starts, used))),
        slots=slice(int(used[0]), int(used[-1]) + 1) if is_range else _to(np.repeat(used, num_tiles), device),
        grid=_to(grid.reshape(-1, num_in_tile), device),
        rows=None if is_whole else _to(rows, device),
        places=None if is_whole else _to(places, device),
    )


def row_by_row(slots_N: Tensor) -> Tiles:
    """The same for rows that all have an adapter, each as a group of its own: for our kernel, and for no slots yet.

    Whoever writes other slots into that tensor later has laid out those.
    """
    order = torch.from_numpy(np.arange(len(slots_N) + 1))
    groups = Groups(order[:-1], order, slots_N)
    return Tiles(groups, slots_N, order[:-1, None], None, None)


def _tile_size(used: NDArray[np.int64], counts: NDArray[np.int64]) -> tuple[int, bool]:
    """(rows in a tile, whether the slots are taken as a range with one tile each), by what costs least."""
    most = int(counts.max())
    best = (int(used[-1] - used[0] + 1) * (most + READ_COST), most, True)
    for exponent in range(most.bit_length()):
        size = 1 << exponent
        num_tiles = int((-(-counts // size)).sum())
        best = min(best, (num_tiles * (size + READ_COST + COPY_COST), size, False))
    return best[1], best[2]


def _to(array: NDArray[np.int64], device: torch.device) -> Tensor:
    return torch.from_numpy(array).to(device)


class LoraMatrix(nn.Module):
    """The factors of all slots for one fused matrix: `a` (S, P R, in), `b` (S, R, out), `scales` (S, P R).

    Parts of one slot lie below each other. What a slot or a part does not use is zero.
    """

    a: Tensor
    b: Tensor
    scales: Tensor

    def __init__(self, matrix: Matrix, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.num_rows = list(matrix.num_rows)
        self.rank = 0
        empty = torch.zeros(0, dtype=dtype, device=device)
        self.register_buffer("a", empty.view(0, 0, matrix.width))
        self.register_buffer("b", empty.view(0, 0, sum(matrix.num_rows)))
        self.register_buffer("scales", empty.float().view(0, 0))
        self.part_rows = torch.tensor(matrix.num_rows)

    def reserve(self, num_slots: int, rank: int) -> bool:
        """Make room for so many slots of such a rank, keeping what is there. True where it lies elsewhere now."""
        num_slots, rank = max(num_slots, len(self.a)), max(rank, self.rank)
        if (num_slots, rank) == (len(self.a), self.rank):
            return False
        num_parts, old_slots, old_rank = len(self.num_rows), len(self.a), self.rank
        a = self.a.new_zeros(num_slots, num_parts, rank, self.a.shape[2])
        b = self.b.new_zeros(num_slots, rank, self.b.shape[2])
        scales = self.scales.new_zeros(num_slots, num_parts, rank)
        a[:old_slots, :, :old_rank] = self.a.view(old_slots, num_parts, old_rank, self.a.shape[2])
        b[:old_slots, :old_rank] = self.b
        scales[:old_slots, :, :old_rank] = self.scales.view(old_slots, num_parts, old_rank)
        self.a, self.b, self.scales, self.rank = a.flatten(1, 2), b, scales.flatten(1, 2), rank
        return True

    def put(self, slot: int, parts: Sequence[Factors | None]) -> None:
        """Fill a slot; what was in it is gone."""
        self.clear(slot)
        for part, (factors, b) in enumerate(zip(parts, torch.split(self.b[slot], self.num_rows, dim=1), strict=True)):
            if factors is not None:
                rank, start = len(factors.a), part * self.rank
                self.a[slot, start : start + rank] = factors.a
                self.scales[slot, start : start + rank] = factors.scale
                b[:rank] = factors.b.t()

    def clear(self, slot: int) -> None:
        """Make a slot change nothing."""
        for stack in (self.a, self.b, self.scales):
            stack[slot].zero_()

    def forward(self, x_NC: Tensor, y_NO: Tensor, tiles: Tiles) -> Tensor:
        """y with what the adapters add to it: in place where no gradient is asked for."""
        if (fast := _kernels_for(x_NC, y_NO, tiles)) is not None:
            fast.add_lora(y_NO, x_NC.contiguous(), (self.a, self.b, self.scales), tiles.groups, self.part_rows)
            return y_NO
        a, b, scales = self.a[tiles.slots], self.b[tiles.slots], self.scales[tiles.slots]
        num_tiles, size = tiles.grid.shape
        x = x_NC.view(num_tiles, size, -1) if tiles.rows is None else x_NC[tiles.grid]
        hidden = (torch.bmm(x, a.transpose(1, 2)) * scales[:, None]).to(x.dtype)  # (n, T, P R)
        parts = zip(torch.split(hidden, self.rank, dim=2), torch.split(b, self.num_rows, dim=2), strict=True)
        added = torch.cat([torch.bmm(h, b_part) for h, b_part in parts], dim=2).flatten(0, 1)
        if tiles.rows is None:
            return y_NO + added if torch.is_grad_enabled() else y_NO.add_(added)
        added = added[tiles.places]
        if torch.is_grad_enabled():
            return y_NO.index_add(0, tiles.rows, added)
        return y_NO.index_add_(0, tiles.rows, added)


def _kernels_for(x_NC: Tensor, y_NO: Tensor, tiles: Tiles) -> Kernels | None:
    if torch.is_grad_enabled() or x_NC.device.type != "cpu" or x_NC.dtype not in (torch.float32, torch.bfloat16):
        return None
    return kernels() if len(tiles.groups.order) <= MOST_ROWS and y_NO.is_contiguous() else None


class Lora:
    """All adapters of a model: `put` one into a slot, and rows of a batch that name the slot are computed with it.

    A model without adapters is left as it is; a batch without adapters costs it a look at `Batch.adapter_ids`.
    Adapters of the unembedding are in `logits` alone, which is told whose each row is: few rows come that far.
    """

    def __init__(self, model: Decoder) -> None:
        self.matrices: dict[str, LoraMatrix] = {}
        self._model = model
        self._known = matrices_of(model.config)
        self.generation = 0  # of the places where the factors lie
        self._num_slots = 0
        self._tiles: Tiles | None = None
        model.register_forward_pre_hook(self._route)

    def put(self, slot: int, adapter: Adapter) -> None:
        """Fill a slot with an adapter; what was in it is gone."""
        while slot >= self._num_slots:
            self._num_slots = max(INITIAL_SLOTS, 2 * self._num_slots)
        for name in adapter:
            if name not in self.matrices:
                self._attach(name)
        for name in self._known:
            if name in self.matrices:
                self._put(name, slot, adapter.get(name))

    def logits(self, hidden_NC: Tensor, slots: NDArray[np.int64]) -> Tensor:
        """(N, V) in the weights' dtype, each row as the adapter of its slot has it (NO_ADAPTER: none)."""
        logits_NV = self._model.logits(hidden_NC)
        matrix = self.matrices.get(UNEMBEDDING)
        tiles = None if matrix is None else lay_out(slots, hidden_NC.device)
        return logits_NV if matrix is None or tiles is None else matrix(hidden_NC, logits_NV, tiles)

    def clear(self, slot: int) -> None:
        """Make a slot change nothing."""
        for matrix in self.matrices.values():
            matrix.clear(slot)

    @torch.no_grad()
    def _put(self, name: str, slot: int, parts: tuple[Factors | None, ...] | None) -> None:
        matrix = self.matrices[name]
        ranks = [len(factors.a) for factors in parts or () if factors is not None]
        if matrix.reserve(self._num_slots, -(-max(ranks, default=1) // RANK_STEP) * RANK_STEP):
            self.generation += 1
        if parts is None:
            matrix.clear(slot)
        else:
            matrix.put(slot, parts)

    def _attach(self, name: str) -> None:
        weight = self._model.embedding.weight
        matrix = LoraMatrix(self._known[name], weight.dtype, weight.device)
        self.matrices[name] = matrix
        self.generation += 1
        if name == UNEMBEDDING:
            return

        def add(_module: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor:
            if self._tiles is None:
                return y
            x: Tensor = args[0]
            return matrix(x.flatten(0, -2), y.flatten(0, -2), self._tiles).view_as(y)

        self._model.get_submodule(name).register_forward_hook(add)

    def _route(self, _module: nn.Module, args: tuple[Any, ...]) -> None:
        """Before each pass of the model: where its rows go."""
        batch: Batch = args[0]
        ids = batch.adapter_ids
        if ids is not None and (recording := current_recording()) is not None:
            self._tiles = row_by_row(ids.flatten())
            recording.kept.append(self._tiles)
        else:
            self._tiles = None if ids is None else lay_out(ids.flatten().numpy(), batch.tokens.device)
