"""The catalogue: which models are served, by name; opens no weights, knows no HTTP and no worker.

Names are all that requests and workers say of models, never paths. A request costs no reading: what was found is
trusted for a second, and after that a model's files are read again only where they have changed.
"""

import asyncio
import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from smelt.control.models import show_model
from smelt.errors import SmeltError, UnknownModel
from smelt.models.folders import read_config
from smelt.models.registry import is_registered, model_in, registered_names

DEFAULT = "default"  # what the model given to `smelt serve` is called too
FRESH_SECONDS = 1.0
MAX_NAMES_TOLD = 20

# Names, sizes and times of a folder's files.
Stamp = tuple[tuple[str, int, int], ...]


@dataclass(frozen=True, slots=True)
class Served:
    """A model that may be asked."""

    name: str
    created: int  # seconds since 1970
    context: int | None = None  # tokens; None where it is not known before the model is loaded


@dataclass(frozen=True, slots=True)
class Examined:
    """A registered folder as it was when it was read; `served` is None where nothing can be done with it."""

    stamp: Stamp
    served: Served | None


class Catalogue:
    """The registered models of a folder and, beside them, the one that `smelt serve` was given."""

    def __init__(self, models_folder: Path, default_model: str | None = None) -> None:
        self._models_folder = models_folder
        self._default = default_model
        self._lock = threading.Lock()
        self._examined: dict[str, Examined] = {}
        self._served: dict[str, Served] = {}
        self._read_at = float("-inf")

    async def all(self) -> list[Served]:
        """Every model that is served: the default one first, the others by name."""
        await asyncio.to_thread(self._read, 0.0)
        by_name = {served.name: served for served in self._served.values()}
        return list(by_name.values())

    async def find(self, name: str) -> Served:
        """The model of that name. UnknownModel says what there is."""
        if name not in self._served or self._age > FRESH_SECONDS:
            await asyncio.to_thread(self._read, FRESH_SECONDS if name in self._served else 0.0)
        try:
            return self._served[name]
        except KeyError:
            raise UnknownModel(self._unknown(name)) from None

    @property
    def _age(self) -> float:
        return time.monotonic() - self._read_at

    def _read(self, max_age_s: float) -> None:
        """Bring the catalogue up to date, if nobody else did while we waited."""
        asked_at = time.monotonic()
        with self._lock:
            if self._read_at >= asked_at - max_age_s:
                return
            began = time.monotonic()
            self._examined = dict(self._examinations())
            served = {name: each.served for name, each in self._examined.items() if each.served is not None}
            default = self._read_default()
            # A worker that was given a folder means it by its name, even where a registered model has the same.
            if default is not None:
                served = {default.name: default, **served, default.name: default}
                served.setdefault(DEFAULT, default)
            self._served = served
            self._read_at = began

    def _examinations(self) -> list[tuple[str, Examined]]:
        found = []
        for name in registered_names(self._models_folder):
            stamp = _stamp(self._models_folder / name)
            known = self._examined.get(name)
            found.append((name, known if known and known.stamp == stamp else self._examine(name, stamp)))
        return found

    def _examine(self, name: str, stamp: Stamp) -> Examined:
        try:
            info = show_model(name, self._models_folder)
            created = int((self._models_folder / name).stat().st_mtime)
        except (SmeltError, OSError):  # it is being removed
            return Examined(stamp, None)
        if info.config is None or info.tokenizer is None:
            return Examined(stamp, None)
        return Examined(stamp, Served(name, created, info.config.block_size))

    def _read_default(self) -> Served | None:
        if self._default is None:
            return None
        name = served_name(self._default)
        if is_registered(self._default, self._models_folder):
            return self._examined[name].served if name in self._examined else None
        path = Path(self._default).expanduser()
        if not path.exists():  # a name on the hub
            return Served(name, 0)
        try:
            folder = model_in(path)
            context = None if folder.is_file() else read_config(folder).block_size
            return Served(name, int(folder.stat().st_mtime), context)
        except (SmeltError, OSError):  # a run that has not saved yet
            return None

    def _unknown(self, name: str) -> str:
        if is_registered(name, self._models_folder):
            return f"the model {name!r} is damaged; smelt models show {name} says how"
        names = sorted(self._served)
        told = ", ".join(names[:MAX_NAMES_TOLD]) + (", ..." if len(names) > MAX_NAMES_TOLD else "")
        return f"no model {name!r} is served; there are: {told or 'none yet (smelt models import)'}"


def served_name(name_or_folder: str) -> str:
    """What clients and workers call a model that `smelt serve` was given."""
    return Path(name_or_folder).expanduser().absolute().name


def _stamp(folder: Path) -> Stamp:
    try:
        stats = [(entry.name, entry.stat()) for entry in os.scandir(folder)]
    except OSError:  # it is being removed
        return ()
    return tuple(sorted((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats))
