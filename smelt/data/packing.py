"""The order in which blocks of a token stream are trained on; knows no tokens, no files and no tensors.

Documents lie one after the other in the stream, so a block is full of tokens and nothing is padding. The order
is a pure function of (seed, sample number): nothing needs saving to resume, and any number of ranks agree.
"""

import numpy as np
from numpy.typing import NDArray

from smelt.errors import NotEnoughData

Int64s = NDArray[np.int64]
NUM_ROUNDS = 6  # enough Feistel rounds for a well-mixed order


class BlockOrder:
    """Every block of an epoch once, in a shuffled order, from O(1) memory; sample numbers never end.

    Each epoch cuts the stream at another offset, so that blocks do not always begin at the same tokens.
    """

    def __init__(self, num_tokens: int, block_size: int, seed: int) -> None:
        if num_tokens < block_size + 1:
            raise NotEnoughData(
                f"the training split holds {num_tokens:,} tokens, but one block needs {block_size + 1:,} "
                f"(block_size + 1); add data or lower --block-size"
            )
        self.block_size = block_size
        self.seed = seed
        whole_blocks = (num_tokens - 1) // block_size
        self.num_blocks = max(1, whole_blocks - 1)
        self.max_offset = num_tokens - 1 - self.num_blocks * block_size

    def starts(self, first_sample: int, num_samples: int) -> Int64s:
        """Token positions (num_samples,) at which the blocks of these samples begin."""
        samples = np.arange(first_sample, first_sample + num_samples, dtype=np.uint64)
        epochs, slots = np.divmod(samples, np.uint64(self.num_blocks))
        keys = mix(epochs + mix(np.full_like(epochs, self.seed)))
        offsets = keys % np.uint64(self.max_offset + 1)
        blocks = shuffle(slots, self.num_blocks, keys)
        return (blocks * np.uint64(self.block_size) + offsets).astype(np.int64)


def mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A 64-bit hash of each value (the finaliser of splitmix64, Steele et al. 2014)."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def shuffle(slots: NDArray[np.uint64], size: int, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The image of each slot under a permutation of 0..size-1 chosen by its key.

    A Feistel network over the next even number of bits; images outside the range walk on until they fall
    inside, which keeps it a permutation (cycle walking, Black and Rogaway 2002).
    """
    half_bits = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    images = _feistel(slots, half_bits, keys)
    while (outside := images >= size).any():
        images[outside] = _feistel(images[outside], half_bits, keys[outside])
    return images


def _feistel(values: NDArray[np.uint64], half_bits: np.uint64, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    low_mask = (np.uint64(1) << half_bits) - np.uint64(1)
    left, right = values >> half_bits, values & low_mask
    for round_number in range(NUM_ROUNDS):
        scrambled = mix(right + keys + np.uint64(round_number << 32)) & low_mask
        left, right = right, left ^ scrambled
    return (left << half_bits) | right


def spread_starts(num_tokens: int, block_size: int, max_blocks: int) -> Int64s:
    """Starts of at most max_blocks blocks that do not overlap, evenly over the stream: the same at each call.

    With room for all of them this is the whole stream but for a rest shorter than a block.
    """
    num_blocks = (num_tokens - 1) // block_size
    if num_blocks == 0:
        raise NotEnoughData(
            f"the validation split holds {num_tokens:,} tokens, but one block needs {block_size + 1:,} "
            f"(block_size + 1); add data, raise --train-val-split or lower --block-size"
        )
    chosen = np.unique(np.linspace(0, num_blocks - 1, min(num_blocks, max_blocks)).round().astype(np.int64))
    return chosen * block_size
