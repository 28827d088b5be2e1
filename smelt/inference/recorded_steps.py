"""Steps in which every sequence computes its newest token, recorded once for each number of them; knows no prompts.

Such a step is the same calls each time, with other tokens at other places. They are made from memory of their own:
see `models.recording`. Shapes: N sequences, G key/value heads, V token ids, C width of the model.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from smelt.inference.adapters import AdapterPool
from smelt.inference.kv_cache import KVCache
from smelt.inference.scheduler import Chunk
from smelt.inference.step_attention import Places, attend_singles, fill_tables
from smelt.models.batch import NO_ADAPTER, Batch
from smelt.models.decoder import Decoder
from smelt.models.kernels import kernels
from smelt.models.recording import Arena, Recording, record

CHANCES = 2  # what is computed once and kept, such as frequencies of rotations, hinders the first recording only
MOST_RECORDED = 32  # sequences: for more, torch's products are faster than ours, and cannot be recorded


class RecordedSteps:
    """Gives hidden states and logits of single tokens, (N, C) and (N, V), until the next step overwrites them."""

    def __init__(self, model: Decoder, cache: KVCache, adapters: AdapterPool, max_blocks: int) -> None:
        self._model = model
        self._cache = cache
        self._adapters = adapters
        self._window = model.config.sliding_window
        self._max_blocks = max_blocks
        self._arena = Arena()
        self._kept: dict[_Key, tuple[_Inputs, Recording]] = {}
        self._chances = CHANCES if cache.device.type == "cpu" else 0

    @property
    def sizes(self) -> list[int]:
        """Of how many sequences steps have been recorded."""
        return sorted({key.num_sequences for key in self._kept})

    def run(self, chunks: list[Chunk], slots_N: NDArray[np.int64]) -> tuple[Tensor, Tensor] | None:
        """The outcome of a step of such chunks, whose adapters are in these slots.

        None where it has to be computed in the ordinary way.
        """
        if not self._chances or len(chunks) > MOST_RECORDED or (fast := kernels()) is None:
            return None
        num_adapted = int(np.count_nonzero(slots_N != NO_ADAPTER))
        if num_adapted and (num_adapted < len(chunks) or self._adapters.change_logits):
            return None
        key = _Key(len(chunks), torch.get_num_threads(), self._adapters.generation if num_adapted else None)
        if key in self._kept:
            inputs, recording = self._kept[key]
            inputs.fill(chunks, slots_N, self._cache)
            return recording.replay()
        inputs = _Inputs(len(chunks), self._cache, self._max_blocks, has_adapters=num_adapted > 0)
        inputs.fill(chunks, slots_N, self._cache)
        recording = record(lambda: self._compute(inputs), self._arena, fast.replay)
        if recording.obstacles:
            self._chances -= 1
        else:
            self._keep(key, inputs, recording)
        return recording.outputs

    def _keep(self, key: "_Key", inputs: "_Inputs", recording: Recording) -> None:
        for other in [other for other in self._kept if other.adapters not in (None, self._adapters.generation)]:
            del self._kept[other]  # it would read where adapters were before
        self._kept[key] = inputs, recording

    def _compute(self, inputs: "_Inputs") -> tuple[Tensor, Tensor]:
        attend = attend_singles(self._cache, inputs.places, self._window)
        batch = Batch(inputs.tokens_1N, positions=inputs.positions_1N, adapter_ids=inputs.slots_1N)
        hidden_NC = self._model(batch, attend)[0]
        return hidden_NC, self._model.logits(hidden_NC)


class _Key(NamedTuple):
    """What must be the same for a recording to be right: all of it is in its calls."""

    num_sequences: int
    num_threads: int
    adapters: int | None  # their generation; None: without any


class _Inputs:
    """What differs from step to step, always at the same addresses."""

    def __init__(self, num_sequences: int, cache: KVCache, max_blocks: int, *, has_adapters: bool) -> None:
        self.tokens_1N = torch.zeros((1, num_sequences), dtype=torch.int64)
        self.positions_1N = torch.zeros((1, num_sequences), dtype=torch.int64)
        self.slots_1N = torch.zeros((1, num_sequences), dtype=torch.int64) if has_adapters else None
        self.places = Places(
            torch.zeros((num_sequences, cache.num_heads), dtype=torch.int64),
            torch.zeros((num_sequences, max_blocks), dtype=torch.int32),
            torch.zeros(num_sequences, dtype=torch.int32),
        )
        # Seen by NumPy, which writes a few numbers in a tenth of torch's time.
        self._tokens, self._positions = self.tokens_1N[0].numpy(), self.positions_1N[0].numpy()
        self._slots = None if self.slots_1N is None else self.slots_1N[0].numpy()
        self._new_ids, self._tables, self._lengths = (x.numpy() for x in self.places)

    def fill(self, chunks: list[Chunk], slots_N: NDArray[np.int64], cache: KVCache) -> None:
        """The tokens of the next step, and where they and those before them lie in the cache."""
        self._tokens[:] = [chunk.sequence.newest_token for chunk in chunks]
        self._positions[:] = [chunk.start for chunk in chunks]
        self._lengths[:] = self._positions + 1
        if self._slots is not None:
            self._slots[:] = slots_N
        blocks_N = np.array([chunk.sequence.block_ids[chunk.start // cache.block_size] for chunk in chunks])
        self._new_ids[:] = cache.vector_ids(blocks_N, self._positions % cache.block_size)
        fill_tables(self._tables, chunks)
