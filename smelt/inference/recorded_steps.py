"""Steps in which every sequence computes its newest token, recorded once for each number of them; knows no prompts.

Such a step is the same calls each time, with other tokens at other places. They are made from memory of their own:
see `models.recording`. Shapes: N sequences, G key/value heads, V token ids, C width of the model.
"""

import numpy as np
import torch
from torch import Tensor

from smelt.inference.kv_cache import KVCache
from smelt.inference.scheduler import Chunk
from smelt.inference.step_attention import Places, attend_singles, fill_tables
from smelt.models.batch import Batch
from smelt.models.decoder import Decoder
from smelt.models.kernels import kernels
from smelt.models.recording import Arena, Recording, record

MOST_RECORDED = 32  # sequences: for more, torch's products are faster than ours, and cannot be recorded


class RecordedSteps:
    """Gives hidden states and logits of single tokens, (N, C) and (N, V), until the next step overwrites them."""

    def __init__(self, model: Decoder, cache: KVCache, max_blocks: int) -> None:
        self._model = model
        self._cache = cache
        self._window = model.config.sliding_window
        self._max_blocks = max_blocks
        self._arena = Arena()
        self._kept: dict[tuple[int, int], tuple[_Inputs, Recording]] = {}
        self._can_be = cache.device.type == "cpu"

    @property
    def sizes(self) -> list[int]:
        """Of how many sequences steps have been recorded."""
        return sorted({size for size, _ in self._kept})

    def run(self, chunks: list[Chunk]) -> tuple[Tensor, Tensor] | None:
        """The outcome of a step of such chunks; None where it has to be computed in the ordinary way."""
        if not self._can_be or len(chunks) > MOST_RECORDED or (fast := kernels()) is None:
            return None
        # A recording has the number of threads in its calls.
        key = (len(chunks), torch.get_num_threads())
        if key in self._kept:
            inputs, recording = self._kept[key]
            inputs.fill(chunks, self._cache)
            return recording.replay()
        inputs = _Inputs(len(chunks), self._cache, self._max_blocks)
        inputs.fill(chunks, self._cache)
        recording = record(lambda: self._compute(inputs), self._arena, fast.replay)
        if recording.obstacles:
            self._can_be = False
        else:
            self._kept[key] = inputs, recording
        return recording.outputs

    def _compute(self, inputs: "_Inputs") -> tuple[Tensor, Tensor]:
        attend = attend_singles(self._cache, inputs.places, self._window)
        hidden_NC = self._model(Batch(inputs.tokens_1N, positions=inputs.positions_1N), attend)[0]
        return hidden_NC, self._model.logits(hidden_NC)


class _Inputs:
    """What differs from step to step, always at the same addresses."""

    def __init__(self, num_sequences: int, cache: KVCache, max_blocks: int) -> None:
        self.tokens_1N = torch.zeros((1, num_sequences), dtype=torch.int64)
        self.positions_1N = torch.zeros((1, num_sequences), dtype=torch.int64)
        self.places = Places(
            torch.zeros((num_sequences, cache.num_heads), dtype=torch.int64),
            torch.zeros((num_sequences, max_blocks), dtype=torch.int32),
            torch.zeros(num_sequences, dtype=torch.int32),
        )
        # Seen by NumPy, which writes a few numbers in a tenth of torch's time.
        self._tokens, self._positions = self.tokens_1N[0].numpy(), self.positions_1N[0].numpy()
        self._new_ids, self._tables, self._lengths = (x.numpy() for x in self.places)

    def fill(self, chunks: list[Chunk], cache: KVCache) -> None:
        """The tokens of the next step, and where they and those before them lie in the cache."""
        self._tokens[:] = [chunk.sequence.newest_token for chunk in chunks]
        self._positions[:] = [chunk.start for chunk in chunks]
        self._lengths[:] = self._positions + 1
        blocks_N = np.array([chunk.sequence.block_ids[chunk.start // cache.block_size] for chunk in chunks])
        self._new_ids[:] = cache.vector_ids(blocks_N, self._positions % cache.block_size)
        fill_tables(self._tables, chunks)
