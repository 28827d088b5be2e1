"""Datums of many sessions as one row of tokens; knows no model, no loss and no session.

Our kernels take each datum as long as it is. For torch it is filled up to a multiple of ADAPTER_TILE with tokens that
nobody looks at, and datums of one length lie side by side. So a datum is computed alike whoever shares the row:
attention sees it at its own length, and adapters see it in tiles of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from smelt.configs import DecoderConfig
from smelt.models.batch import Batch
from smelt.models.fixed_tiles import TILE_ROWS
from smelt.models.layers import Attend, attend_within
from smelt.models.text_attention import attend_row
from smelt.models.training_kernels import Texts

ADAPTER_TILE = 32  # tokens: more waste what is filled up, fewer take memory for the gradients of each tile


@dataclass(frozen=True, slots=True)
class Place:
    """Where a datum lies in the row: its tokens, and with what fills it up."""

    start: int
    num_tokens: int
    num_rows: int


@dataclass(frozen=True, slots=True)
class PackedData:
    """One row of N tokens. `places` are in the order of the datums that were given, `groups` in that of the row."""

    tokens: NDArray[np.int64]  # (N,)
    positions: NDArray[np.int64]  # (N,)
    places: tuple[Place, ...]
    groups: tuple[tuple[int, int], ...]  # (how many datums, their length filled up), one after the other

    def batch(self, device: torch.device) -> Batch:
        """For `Decoder.forward`."""
        tokens, positions = (torch.from_numpy(each)[None].to(device) for each in (self.tokens, self.positions))
        return Batch(tokens, positions=positions)

    def attend(self, config: DecoderConfig) -> Attend:
        """Each datum attends to itself."""
        lengths = [length for num, length in self.groups for _ in range(num)]
        texts = Texts(torch.tensor([0, *accumulate(lengths)]), window=config.sliding_window)
        return attend_row(texts, lambda: self._attend_by_torch(config))

    def _attend_by_torch(self, config: DecoderConfig) -> Attend:
        """The same, in a batch of those of each length."""
        shapes = [Batch(torch.empty(num, length, dtype=torch.int64)) for num, length in self.groups]
        each = [attend_within(shape, config, 0.0, fused=True) for shape in shapes]
        lengths = [num * length for num, length in self.groups]

        def attend(layer: int, q_1NHD: Tensor, k_1NGD: Tensor, v_1NGD: Tensor) -> Tensor:
            parts = zip(*(x[0].split_with_sizes(lengths) for x in (q_1NHD, k_1NGD, v_1NGD)), strict=True)
            mixed = [
                attend_group(layer, *(x.unflatten(0, group) for x in qkv)).flatten(0, 1)
                for attend_group, group, qkv in zip(each, self.groups, parts, strict=True)
            ]
            return torch.cat(mixed)[None]

        return attend


def pack(data: Sequence[NDArray[np.int32]], *, filled_up: bool) -> PackedData:
    """The tokens of datums, none of them empty, as one row: filled up for torch, or for our kernels as they are."""
    # Torch computes the last numbers of a row in another way than the others, so a few are spare in any case.
    tile, whole = (ADAPTER_TILE, TILE_ROWS) if filled_up else (1, ADAPTER_TILE)
    lengths = [-(-len(tokens) // tile) * tile for tokens in data]
    order = sorted(range(len(data)), key=lengths.__getitem__)
    num_tokens = sum(lengths)
    spare = -num_tokens % whole
    row = np.zeros(num_tokens + spare, np.int64)
    positions = np.zeros(num_tokens + spare, np.int64)
    places: dict[int, Place] = {}
    start = 0
    for index in order:
        own, length = data[index], lengths[index]
        row[start : start + len(own)] = own
        positions[start : start + length] = np.minimum(np.arange(length), len(own) - 1)
        places[index] = Place(start, len(own), length)
        start += length
    positions[num_tokens:] = np.arange(spare) % ADAPTER_TILE
    return PackedData(row, positions, tuple(places[i] for i in range(len(data))), _groups(sorted(lengths), spare))


def _groups(lengths: list[int], spare: int) -> tuple[tuple[int, int], ...]:
    """What fills up the last tile is a datum of its own, or a few: an adapter's tile never comes alone."""
    groups = [(lengths.count(length), length) for length in dict.fromkeys(lengths)]
    length = min(spare, ADAPTER_TILE)
    return (*groups, (spare // length, length)) if spare else tuple(groups)
