"""Attention of one step, in which many sequences compute different numbers of tokens; knows no weights.

All tokens of a step lie in one row, chunk after chunk. Each layer first writes the new keys and values into their
blocks; then each token looks at the blocks of its own sequence, up to itself. So a token's outcome does not depend on
how its prompt was cut into chunks, nor on what others compute beside it.

Shapes: N tokens of the step, T of a chunk, L positions that a chunk looks at, H query heads, G key/value heads, D
width of a head, B chunks of a single token.
"""

from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from smelt.inference.kv_cache import KVCache
from smelt.inference.scheduler import Chunk
from smelt.models.kernels import training_kernels
from smelt.models.layers import Attend
from smelt.models.paged_attention import attend_paged
from smelt.models.text_attention import attend_texts
from smelt.models.training_kernels import Texts


@dataclass(frozen=True, slots=True)
class Span:
    """A chunk of several tokens: where it lies in the step, and what it looks at."""

    place: slice
    ids_LG: Tensor | None  # vectors in the cache; None where it looks at nothing but itself
    mask_TL: Tensor | None  # None: plain causal attention

    @property
    def is_whole(self) -> bool:
        """Whether it is all that its sequence has yet."""
        return self.ids_LG is None


class Places(NamedTuple):
    """Where single tokens go to in the cache, and where what they look at lies."""

    new_ids_BG: Tensor  # vectors of the cache, int64
    tables_BN: Tensor  # blocks, int32; beyond a row's length any block's number
    lengths_B: Tensor  # positions, the token's own included, int32


def attend_singles(cache: KVCache, places: Places, window: int | None) -> Attend:
    """For `Decoder.forward`, with one token of each of several sequences."""

    def attend(layer: int, q_1BHD: Tensor, k_1BGD: Tensor, v_1BGD: Tensor) -> Tensor:
        cache.write(layer, places.new_ids_BG, k_1BGD[0], v_1BGD[0])
        return attend_paged(q_1BHD[0], *cache.layers[layer], places.tables_BN, places.lengths_B, window)[None]

    return attend


def attend_chunks(cache: KVCache, chunks: list[Chunk], window: int | None) -> Attend:
    """For `Decoder.forward`, with the tokens of these chunks: those of a single token come first."""
    new_ids = _new_ids(cache, chunks)
    num_singles = sum(chunk.num_tokens == 1 for chunk in chunks)
    tables_BN, lengths_B = _tables(chunks[:num_singles], cache.device)
    spans = _spans(cache, chunks[num_singles:], num_singles, window)
    wholes = _wholes(spans, window)
    if not spans:
        return attend_singles(cache, Places(new_ids, tables_BN, lengths_B), window)

    def attend(layer: int, q_1NHD: Tensor, k_1NGD: Tensor, v_1NGD: Tensor) -> Tensor:
        q_NHD, k_NGD, v_NGD = q_1NHD[0], k_1NGD[0], v_1NGD[0]
        cache.write(layer, new_ids, k_NGD, v_NGD)
        keys, values = cache.layers[layer]
        mixed_NHD = q_NHD.new_empty(q_NHD.shape)
        if num_singles:
            single_q = q_NHD[:num_singles]
            mixed_NHD[:num_singles] = attend_paged(single_q, keys, values, tables_BN, lengths_B, window)
        fast = training_kernels(q_NHD)
        if fast is not None:
            for place, texts in wholes:
                mixed_NHD[place] = attend_texts(fast, q_NHD[place], k_NGD[place], v_NGD[place], texts)
        for span in spans:
            if fast is not None and span.is_whole:
                continue
            k_LGD, v_LGD = k_NGD[span.place], v_NGD[span.place]
            if span.ids_LG is not None:
                k_LGD, v_LGD = cache.read(layer, span.ids_LG)
            mixed_NHD[span.place] = _attend_span(q_NHD[span.place], k_LGD, v_LGD, span.mask_TL)
        return mixed_NHD[None]

    return attend


def _attend_span(q_THD: Tensor, k_LGD: Tensor, v_LGD: Tensor, mask_TL: Tensor | None) -> Tensor:
    """(T, H, D)."""
    mixed_1HTD = F.scaled_dot_product_attention(
        q_THD.transpose(0, 1)[None],
        k_LGD.transpose(0, 1)[None],
        v_LGD.transpose(0, 1)[None],
        mask_TL,
        is_causal=mask_TL is None,
        enable_gqa=q_THD.shape[1] != k_LGD.shape[1],
    )
    return mixed_1HTD[0].transpose(0, 1)


def _new_ids(cache: KVCache, chunks: list[Chunk]) -> Tensor:
    """(N, G) vectors of the cache that the step's tokens are written to."""
    places = [_places(chunk, chunk.start, cache.block_size) for chunk in chunks]
    blocks_N, offsets_N = (np.concatenate(parts) for parts in zip(*places, strict=True))
    return cache.vector_ids(blocks_N, offsets_N)


def _places(chunk: Chunk, start: int, block_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Blocks, and offsets in them, of a sequence's positions from `start` to the end of its chunk."""
    first = start // block_size
    blocks = np.array(chunk.sequence.block_ids[first : (chunk.end - 1) // block_size + 1])
    positions = np.arange(start, chunk.end)
    return blocks[positions // block_size - first], positions % block_size


def _tables(chunks: list[Chunk], device: torch.device) -> tuple[Tensor, Tensor]:
    """(B, most blocks of one), and lengths (B,), both int32."""
    width = max((len(chunk.sequence.block_ids) for chunk in chunks), default=0)
    tables_BN = np.zeros((len(chunks), width), dtype=np.int32)
    fill_tables(tables_BN, chunks)
    lengths_B = np.array([chunk.end for chunk in chunks], dtype=np.int32)
    return torch.from_numpy(tables_BN).to(device), torch.from_numpy(lengths_B).to(device)


def fill_tables(tables_BN: NDArray[np.int32], chunks: list[Chunk]) -> None:
    """Write the chunks' blocks to the beginnings of the rows."""
    for row, chunk in zip(tables_BN, chunks, strict=True):
        blocks = chunk.sequence.block_ids
        row[: len(blocks)] = blocks


def _spans(cache: KVCache, chunks: list[Chunk], begin: int, window: int | None) -> list[Span]:
    spans = []
    for chunk in chunks:
        place = slice(begin, begin + chunk.num_tokens)
        first = 0 if window is None else max(0, chunk.start - window + 1)  # the first position that it looks at
        is_whole = chunk.start == 0
        ids_LG = None if is_whole else cache.vector_ids(*_places(chunk, first, cache.block_size))
        is_causal = is_whole and (window is None or window >= chunk.end)
        mask_TL = None if is_causal else _mask(chunk, first, window).to(cache.device)
        spans.append(Span(place, ids_LG, mask_TL))
        begin = place.stop
    return spans


def _wholes(spans: list[Span], window: int | None) -> list[tuple[slice, Texts]]:
    """Where whole prompts lie, and what they are to our kernel: neighbours together."""
    found = []
    for is_whole, group in groupby(spans, key=lambda span: span.is_whole):
        places = [span.place for span in group]
        if is_whole:
            first = places[0].start
            starts = torch.tensor([0, *(place.stop - first for place in places)])
            found.append((slice(first, places[-1].stop), Texts(starts, window=window)))
    return found


def _mask(chunk: Chunk, first: int, window: int | None) -> Tensor:
    """(T, L) true where a token of the chunk may look, at positions from `first` on."""
    distances_TL = torch.arange(chunk.start, chunk.end)[:, None] - torch.arange(first, chunk.end)[None, :]
    visible_TL = distances_TL >= 0
    return visible_TL if window is None else visible_TL & (distances_TL < window)
