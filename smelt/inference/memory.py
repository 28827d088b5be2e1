"""How much memory models take and there is: predicted before anything is loaded; knows no names and no requests."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from smelt.configs import DecoderConfig
from smelt.inference.classifier import SLICE_TOKENS
from smelt.inference.engine import BLOCK_SIZE, MAX_STEP_TOKENS
from smelt.inference.kv_cache import default_num_blocks
from smelt.models.devices import free_memory
from smelt.models.encoder_architectures import ClassifierShape, NgramConfig
from smelt.models.folders import Stamp
from smelt.models.footprint import kv_bytes_per_token, weights_bytes

MIB = 2**20
MARGIN = 0.1  # of what is free, for whatever else the machine does


@dataclass(frozen=True, slots=True)
class Candidate:
    """A model that could be loaded: what changes when its files do, and the memory it would take."""

    stamp: Stamp = ()
    num_bytes: int = 0


def predicted_bytes(config: DecoderConfig, dtype: torch.dtype, cache_bytes: int, quantized: bool = False) -> int:
    """Weights, cache, and what one step holds beside them."""
    return weights_bytes(config, dtype.itemsize, quantized) + cache_bytes + step_bytes(config, dtype)


def classifier_bytes(shape: ClassifierShape, dtype: torch.dtype) -> int:
    """Weights of a classifier, and the widest activations of a slice of texts; it keeps no cache."""
    backbone = shape.backbone
    if isinstance(backbone, NgramConfig):
        return shape.num_parameters * torch.float32.itemsize
    return shape.num_parameters * dtype.itemsize + SLICE_TOKENS * (backbone.n_inner + 6 * backbone.n_embd) * 4


def default_cache_bytes(config: DecoderConfig, dtype: torch.dtype, device: torch.device, max_running: int) -> int:
    """What the engine's cache takes where nothing is said about it."""
    num_blocks = default_num_blocks(max_running, config, BLOCK_SIZE, dtype, device)
    return num_blocks * BLOCK_SIZE * kv_bytes_per_token(config, dtype.itemsize)


def step_bytes(config: DecoderConfig, dtype: torch.dtype, num_rows: int = 32) -> int:
    """Logits in fp32 of as many rows as are drawn at once, and the widest activations of a step's tokens."""
    widest = 3 * config.n_inner + 4 * config.n_embd + (config.n_head + 2 * config.n_kv_head) * config.head_dim
    return num_rows * config.vocab_size * 4 * 2 + MAX_STEP_TOKENS * widest * dtype.itemsize


@dataclass(frozen=True, slots=True)
class Upkeep:
    """How models come and go. `examine` raises why there is no model of a name, without loading anything.

    `limit_bytes` None takes what is free on the device. A model that nobody asked for in `keep_alive_s` is unloaded.
    """

    examine: Callable[[str], Candidate] = lambda _: Candidate()
    limit_bytes: int | None = None
    keep_alive_s: float = 300.0
    patience_s: float = 60.0  # that requests wait for memory which running answers hold
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


class Room:
    """What models may take together. What is free on the machine is judged twice: what was free at first less what
    the loaded ones will take (a cache fills later), and what is free now (others use the machine too).

    `num_lent` bytes of what was free at first are for runs, whether they have taken them yet or not.
    """

    def __init__(self, upkeep: Upkeep) -> None:
        self._limit = upkeep.limit_bytes
        self._device = upkeep.device
        self._free_at_first = free_memory(upkeep.device)
        self.num_lent = 0

    @property
    def most(self) -> int:
        """Bytes for all models, if nobody else took any."""
        return self._limit if self._limit is not None else int(self._free_at_first * (1 - MARGIN))

    def left(self, num_taken: int) -> int:
        """Bytes for one more model beside those that take so many."""
        if self._limit is not None:
            left = self._limit - num_taken
        else:
            left = int(min(self._free_at_first - num_taken, self.free) * (1 - MARGIN))
        return left if self.num_lent == 0 else min(left, self._beside_runs(num_taken))

    @property
    def free(self) -> int:
        """Bytes that nobody on the machine has taken."""
        return free_memory(self._device)

    def is_overdrawn(self, num_taken: int) -> bool:
        """Whether models that take so many may come to hold what was lent."""
        return self.num_lent > 0 and self._beside_runs(num_taken) < 0

    def _beside_runs(self, num_taken: int) -> int:
        return int(self._free_at_first * (1 - MARGIN)) - self.num_lent - num_taken
