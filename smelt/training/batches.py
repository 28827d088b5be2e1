"""Batches of blocks from a dataset's split, for training and for evaluation; knows no model and no optimizer."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from smelt.data.packing import BlockOrder, spread_starts
from smelt.data.shards import TokenSplit
from smelt.models.batch import Batch
from smelt.training.job import BatchSize
from smelt.training.parallel import Ranks


def read_batch(split: TokenSplit, starts: NDArray[np.int64], block_size: int, device: torch.device) -> Batch:
    """Blocks as rows; the target of each token is the next one of the stream."""
    rows_BT1 = torch.from_numpy(split.gather(starts, block_size + 1))
    if device.type == "cuda":
        rows_BT1 = rows_BT1.pin_memory()
    rows_BT1 = rows_BT1.to(device, non_blocking=True)
    return Batch(tokens=rows_BT1[:, :-1].contiguous(), targets=rows_BT1[:, 1:].contiguous())


class BlockBatches:
    """The rows of each global batch, in an order that depends on seed and step alone, shared by the ranks."""

    def __init__(self, split: TokenSplit, order: BlockOrder, ranks: Ranks, num_rows: int, micro_rows: int) -> None:
        self.split = split
        self.order = order
        self.num_rows = num_rows  # of the global batch
        self.ranks = ranks
        ranks.rows(num_rows)  # refuses those that cannot be shared before anything is computed
        self.micro_rows = micro_rows

    def size(self, step: int) -> BatchSize:
        """Every step's global batch is as large."""
        num_tokens = self.num_rows * self.order.block_size
        return BatchSize(num_targets=num_tokens, num_tokens=num_tokens)

    def starts(self, step: int, rank: int) -> NDArray[np.int64]:
        """Where a rank's blocks of a step (counted from 0) begin."""
        own_rows = replace(self.ranks, rank=rank).rows(self.num_rows)
        return self.order.starts(step * self.num_rows, self.num_rows)[own_rows]

    def micro_batches(self, step: int, device: torch.device, rank: int) -> Iterator[Batch]:
        """A rank's share of a step's global batch, `micro_rows` rows at a time."""
        starts = self.starts(step, rank)
        for first in range(0, len(starts), self.micro_rows):
            yield read_batch(self.split, starts[first : first + self.micro_rows], self.order.block_size, device)

    def describe(self, step: int) -> str:
        """Numbers of the first 20 documents that this rank's blocks of a step begin in."""
        documents = sorted({self.split.document_at(int(start)) for start in self.starts(step, self.ranks.rank)})
        return f"that begins in documents {', '.join(map(str, documents[:20]))}"


class EvalBatches:
    """The same blocks of a split at every evaluation, shared by the ranks."""

    def __init__(self, split: TokenSplit, block_size: int, ranks: Ranks, num_rows: int) -> None:
        self.split = split
        self.block_size = block_size
        self.ranks = ranks
        self.num_rows = num_rows

    def batches(self, max_batches: int | None, device: torch.device, rank: int) -> Iterator[Batch]:
        """A rank's share of up to max_batches evenly spread batches; None: of the whole split."""
        max_blocks = self.split.num_tokens if max_batches is None else max_batches * self.num_rows
        starts = spread_starts(self.split.num_tokens, self.block_size, max_blocks)
        own = starts[rank :: self.ranks.world_size]
        for first in range(0, len(own), self.num_rows):
            yield read_batch(self.split, own[first : first + self.num_rows], self.block_size, device)
