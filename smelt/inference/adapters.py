"""AdapterPool: the LoRA adapters that an engine can use now, by name; knows no requests and no HTTP."""

from pathlib import Path

from smelt.errors import AlreadyExists, InvalidInput, UnknownAdapter
from smelt.models.adapter_folders import read_adapter
from smelt.models.decoder import Decoder
from smelt.models.lora import Lora

MAX_ADAPTERS = 64


class AdapterPool:
    """Names and slots. Adapters come and go between the steps of an engine, on the thread that steps it."""

    def __init__(self, model: Decoder, max_adapters: int = MAX_ADAPTERS) -> None:
        self._model = model
        self._max_adapters = max_adapters
        self._slots: dict[str, int] = {}
        self._versions: dict[str, int] = {}
        self._num_added = 0
        self._lora: Lora | None = None

    @property
    def names(self) -> list[str]:
        """Those that can be used, in order of their arrival."""
        return list(self._slots)

    def add(self, name: str, folder: Path) -> None:
        """Load the adapter of a PEFT folder. AlreadyExists, InvalidInput, NotFound or UnsupportedModel say why not."""
        if name in self._slots:
            raise AlreadyExists(f"an adapter {name!r} is loaded already; remove it first")
        if len(self._slots) >= self._max_adapters:
            raise InvalidInput(f"{self._max_adapters} adapters are loaded, which is the limit; remove one first")
        adapter = read_adapter(folder, self._model.config)
        if self._lora is None:
            self._lora = Lora(self._model)
        slot = min(set(range(len(self._slots) + 1)) - set(self._slots.values()))
        self._lora.put(slot, adapter)
        self._slots[name] = slot
        self._num_added += 1
        self._versions[name] = self._num_added

    def remove(self, name: str) -> None:
        """Forget an adapter. UnknownAdapter where there is none."""
        slot = self.slot(name)
        assert self._lora is not None, "there is one with slots"
        self._lora.clear(slot)
        del self._slots[name], self._versions[name]

    def slot(self, name: str) -> int:
        """What stands for an adapter in `Batch.adapter_ids`. UnknownAdapter names those there are."""
        if name not in self._slots:
            known = ", ".join(self._slots) or "none"
            raise UnknownAdapter(f"no adapter {name!r} is loaded; known: {known}")
        return self._slots[name]

    def version(self, name: str) -> int:
        """Tells an adapter from others that had its name before. UnknownAdapter where there is none."""
        self.slot(name)
        return self._versions[name]
