"""AdapterPool: the LoRA adapters that an engine can use now, by name; knows no requests and no HTTP."""

from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from smelt.errors import AlreadyExists, InvalidInput, Unavailable, UnknownAdapter
from smelt.models.adapter_folders import UNEMBEDDING, Adapter, read_adapter
from smelt.models.decoder import Decoder
from smelt.models.lora import Lora

MAX_ADAPTERS = 64
MAX_IN_USE = 512  # of those that come and go by themselves, while answers are written with them


class Loaded(NamedTuple):
    """An adapter that is in use: its slot, and a number that no other adapter had before."""

    slot: int
    version: int


class AdapterPool:
    """Names and slots, the adapter that was used longest ago first. They come and go between the steps of an engine."""

    def __init__(self, model: Decoder, max_adapters: int = MAX_ADAPTERS) -> None:
        self._model = model
        self._max_adapters = max_adapters
        self._loaded: dict[str, Loaded] = {}
        self._num_added = 0
        self._lora: Lora | None = None

    @property
    def names(self) -> list[str]:
        """Those that can be used, the one that was used longest ago first."""
        return list(self._loaded)

    @property
    def generation(self) -> int:
        """Another one when the weights of adapters have moved to other places."""
        return 0 if self._lora is None else self._lora.generation

    @property
    def change_logits(self) -> bool:
        """Whether there have been adapters of the unembedding."""
        return self._lora is not None and UNEMBEDDING in self._lora.matrices

    def add(self, name: str, folder: Path) -> None:
        """Load the adapter of a PEFT folder. AlreadyExists, InvalidInput, NotFound or UnsupportedModel say why not."""
        if name in self._loaded:
            raise AlreadyExists(f"an adapter {name!r} is loaded already; remove it first")
        if len(self._loaded) >= self._max_adapters:
            raise InvalidInput(f"{self._max_adapters} adapters are loaded, which is the limit; remove one first")
        self._put(name, read_adapter(folder, self._model.config))

    def keep(self, name: str, adapter: Adapter, in_use: Collection[str]) -> None:
        """Put an adapter there unless its name is; the one that was used longest ago makes way, if it is not in use.

        Unavailable where too many are.
        """
        if name in self._loaded:
            return
        idle = [other for other in self._loaded if other not in in_use]
        if len(self._loaded) >= self._max_adapters and idle:
            self.remove(idle[0])
        elif len(self._loaded) >= MAX_IN_USE:
            raise Unavailable(f"{len(self._loaded)} adapters are in use; try again", retry_after_s=5)
        self._put(name, adapter)

    def _put(self, name: str, adapter: Adapter) -> None:
        if self._lora is None:
            self._lora = Lora(self._model)
        slot = min(set(range(len(self._loaded) + 1)) - {loaded.slot for loaded in self._loaded.values()})
        self._lora.put(slot, adapter)
        self._num_added += 1
        self._loaded[name] = Loaded(slot, self._num_added)

    def remove(self, name: str) -> None:
        """Forget an adapter; the next step of answers that use it fails. UnknownAdapter where there is none."""
        slot = self._find(name).slot
        assert self._lora is not None, "there is one with slots"
        self._lora.clear(slot)
        del self._loaded[name]

    def version(self, name: str) -> int:
        """Tells an adapter from others that had its name before. UnknownAdapter where there is none.

        Whoever asks is about to use it.
        """
        loaded = self._find(name)
        self._loaded[name] = self._loaded.pop(name)  # the one that was used last comes last
        return loaded.version

    def slot(self, name: str, version: int) -> int:
        """What stands for an adapter in `Batch.adapter_ids`. UnknownAdapter where that one is gone."""
        loaded = self._find(name)
        if loaded.version != version:
            raise UnknownAdapter(f"adapter {name!r} was replaced while an answer was written with it; ask again")
        return loaded.slot

    def logits(self, hidden_NC: Tensor, slots: NDArray[np.int64]) -> Tensor:
        """(N, V) of hidden states, each with the adapter of its slot (NO_ADAPTER: none)."""
        return self._model.logits(hidden_NC) if self._lora is None else self._lora.logits(hidden_NC, slots)

    def _find(self, name: str) -> Loaded:
        if name not in self._loaded:
            raise UnknownAdapter(f"no adapter {name!r} is loaded; known: {', '.join(self._loaded) or 'none'}")
        return self._loaded[name]
