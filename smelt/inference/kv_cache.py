"""KVCache: keys and values of all sequences, in blocks; knows no model, no sequences and no order of work.

Shapes: G key/value heads, D width of a head, N tokens.
"""

import math

import numpy as np
import torch
from torch import Tensor

from smelt.configs import DecoderConfig
from smelt.errors import InvalidInput
from smelt.models.devices import free_memory
from smelt.models.footprint import kv_bytes_per_token
from smelt.models.rowwise import write_cache

SHARE_OF_MEMORY = 0.25  # of what is free: a cache takes no more unless it is told to
ALIGNMENT = 64  # bytes, a cache line of the processor


class KVCache:
    """`layers`: per layer keys and values, (num_blocks, G, block_size, D) each, in the weights' dtype."""

    def __init__(
        self, config: DecoderConfig, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.block_size = block_size
        self.num_heads = config.n_kv_head
        self.head_dim = config.head_dim
        self.device = device
        shape = (config.n_layer, 2, num_blocks, config.n_kv_head, block_size, config.head_dim)
        self._all = _zeros(shape, dtype, device)
        self.layers = [(layer[0], layer[1]) for layer in self._all]

    @torch.inference_mode()
    def copy(self, blocks: list[tuple[int, int]]) -> None:
        """Copy what blocks hold: (from, to) pairs, all read before any is written."""
        if blocks:
            sources, targets = torch.tensor(blocks, device=self.device).unbind(1)
            self._all[:, :, targets] = self._all[:, :, sources]

    def vector_ids(self, blocks_N: np.ndarray, offsets_N: np.ndarray) -> Tensor:
        """(N, G): which vectors of a layer's keys, seen as (all vectors, D), are those places' in its blocks."""
        heads_G = np.arange(self.num_heads)
        ids_NG = (blocks_N[:, None] * self.num_heads + heads_G) * self.block_size + offsets_N[:, None]
        return torch.from_numpy(ids_NG).to(self.device)

    def write(self, layer: int, ids_NG: Tensor, k_NGD: Tensor, v_NGD: Tensor) -> None:
        """Put keys and values at the places of these `vector_ids`."""
        write_cache(k_NGD, v_NGD, ids_NG, *self.layers[layer])

    def read(self, layer: int, ids_LG: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (L, G, D) of these `vector_ids`, copied."""
        flat, shape = ids_LG.reshape(-1), (*ids_LG.shape, self.head_dim)
        keys, values = (x.view(-1, self.head_dim).index_select(0, flat).view(shape) for x in self.layers[layer])
        return keys, values


def num_blocks_in(num_bytes: int, config: DecoderConfig, block_size: int, dtype: torch.dtype) -> int:
    """Blocks that so many bytes hold. InvalidInput where that is not one."""
    per_block = kv_bytes_per_token(config, dtype.itemsize) * block_size
    if num_bytes < per_block:
        raise InvalidInput(
            f"a cache of {num_bytes} bytes does not hold {block_size} tokens of this model, which take {per_block}; "
            f"give it more"
        )
    return num_bytes // per_block


def default_num_blocks(
    num_sequences: int, config: DecoderConfig, block_size: int, dtype: torch.dtype, device: torch.device
) -> int:
    """Blocks for so many whole contexts, but for one at least and beyond it no more than a share of the memory."""
    per_context = -(-config.block_size // block_size)
    per_block = kv_bytes_per_token(config, dtype.itemsize) * block_size
    limit = int(free_memory(device) * SHARE_OF_MEMORY) // per_block
    return max(per_context, min(num_sequences * per_context, limit))


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros, not whatever was there: a masked position has weight 0, but 0 x NaN is NaN."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # NumPy asks the system for zeroed pages, which take no memory until they are written; torch writes them all.
    num_bytes = math.prod(shape) * dtype.itemsize
    buffer = np.zeros(num_bytes + ALIGNMENT, dtype=np.uint8)
    start = -buffer.ctypes.data % ALIGNMENT
    return torch.from_numpy(buffer[start : start + num_bytes]).view(dtype).view(shape)
