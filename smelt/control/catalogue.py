"""The catalogue: which models are served, by name; opens no weights, knows no HTTP and no worker.

Names are all that requests and workers say of models, never paths. A request costs no reading: what was found is
trusted for a second, and after that a model's files are read again only where they have changed.
"""

import asyncio
import difflib
import json
import logging
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path

from smelt.configs import DecoderConfig
from smelt.control.models import show_model
from smelt.errors import InvalidInput, SmeltError, StorageError, Unavailable, UnknownModel
from smelt.models.aliases import DEFAULT, DEFAULT_NAMES, read_aliases, write_whole
from smelt.models.encoder_architectures import ClassifierShape
from smelt.models.folders import Stamp, base_of, classifier_in, is_adapter, read_config, stamp_of
from smelt.models.registry import default_name, is_registered, model_in, name_at, registered_names

CHOICE_FILE = ".chosen.json"
FRESH_SECONDS = 1.0
MAX_NAMES_TOLD = 20

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Served:
    """A model that may be asked. What is None is not known before the model is loaded."""

    name: str
    created: int  # seconds since 1970
    config: DecoderConfig | None = None
    num_bytes: int | None = None  # on the disk
    folder: Path | None = None  # for this process alone: requests and workers say names
    base: str | None = None  # where it is an adapter: the model that it changes
    adapter: str | None = None  # and its folder, below the home folder
    classifier: ClassifierShape | None = None  # where it says labels instead of writing

    @property
    def loaded(self) -> str:
        """The model that a worker holds to answer for it."""
        return self.base or self.name

    @property
    def context(self) -> int | None:
        """The longest context in tokens."""
        shape = self.config or self.classifier
        return None if shape is None else shape.block_size


@dataclass(frozen=True, slots=True)
class Examined:
    """A registered folder as it was when it was read; `served` is None where nothing can be done with it."""

    stamp: Stamp
    served: Served | None


class Catalogue:
    """The registered models of a folder and, beside them, the one that `smelt serve` was given.

    `gpt` and `default` mean the model that `choose` chose or else the one that was given, or else what the alias
    `default` says, or else the only one there is.
    """

    def __init__(self, models_folder: Path, default_model: str | None = None) -> None:
        self._models_folder = models_folder
        self._given = default_model
        self._lock = threading.Lock()
        self._examined: dict[str, Examined] = {}
        self._served: dict[str, Served] = {}
        self._aliases: dict[str, Served] = {}
        self._read_at = float("-inf")

    @property
    def models_folder(self) -> Path:
        """Where registered models lie."""
        return self._models_folder

    async def all(self) -> list[Served]:
        """Every model that is served: the one that was given first, the others by name."""
        await asyncio.to_thread(self._read, 0.0)
        return list(self._served.values())

    async def aliases(self) -> dict[str, Served]:
        """What models are called too, `gpt` and `default` among it where there is a default model."""
        await asyncio.to_thread(self._read, FRESH_SECONDS)
        return dict(self._aliases)

    async def find(self, name: str) -> Served:
        """The model of that name or alias; an underscore may stand for a dash. UnknownModel says what there is.

        Its folder is a name too: there Tinker's clients find the tokenizer.
        """
        known = self._look_up(name)
        if known is None or self._age > FRESH_SECONDS:
            await asyncio.to_thread(self._read, FRESH_SECONDS if known else 0.0)
            known = self._look_up(name)
        if known is None:
            raise UnknownModel(self._unknown(name))
        return known

    async def find_classifier(self, name: str | None) -> Served:
        """The classifier of that name or alias; without one the default model if it is one, or else the only one.

        UnknownModel, Unavailable where there is none, InvalidInput where it is not clear which.
        """
        if name is not None:
            return await self.find(name)
        await asyncio.to_thread(self._read, FRESH_SECONDS)
        default = self._aliases.get(DEFAULT)
        if default is not None and default.classifier is not None:
            return default
        classifiers = [each for each in self._served.values() if each.classifier is not None]
        if len(classifiers) == 1:
            return classifiers[0]
        if classifiers:
            names = _told(sorted(each.name for each in classifiers))
            raise InvalidInput(f"there are several classifiers: say which as model: {names}", "model")
        raise Unavailable(
            "no classifier is served; train one with smelt train-classifier, and serve it: smelt serve OUT_DIR, or "
            "smelt models import OUT_DIR NAME"
        )

    async def choose(self, name: str) -> Served:
        """Make a model the default one for as long as this server lives, through restarts of its processes too."""
        served = await self.find(name)
        self._models_folder.mkdir(parents=True, exist_ok=True)
        await asyncio.to_thread(write_whole, self._models_folder / CHOICE_FILE, json.dumps(served.name))
        await self.refresh()
        return served

    async def refresh(self) -> None:
        """See at once what this process has changed."""
        await asyncio.to_thread(self._read, 0.0)

    @property
    def _age(self) -> float:
        return time.monotonic() - self._read_at

    def _look_up(self, name: str) -> Served | None:
        if name.startswith("/"):
            return next(
                (each for each in self._served.values() if each.folder == Path(name) and each.base is None), None
            )
        return self._served.get(name) or self._aliases.get(name) or self._served.get(name.replace("_", "-"))

    def _read(self, max_age_s: float) -> None:
        """Bring the catalogue up to date, if nobody else did while we waited."""
        asked_at = time.monotonic()
        with self._lock:
            if self._read_at >= asked_at - max_age_s:
                return
            began = time.monotonic()
            self._examined = dict(self._examinations())
            served = {name: each.served for name, each in self._examined.items() if each.served is not None}
            given = self._read_given()
            # A worker that was given a folder means it by its name, even where a registered model has the same.
            if given is not None:
                served = {given.name: given, **served, given.name: given}
            self._served = {name: each for name, each in served.items() if each.base is None or each.base in served}
            self._read_aliases(given)
            self._read_at = began

    def _read_aliases(self, given: Served | None) -> None:
        try:
            targets = read_aliases(self._models_folder)
        except StorageError as damage:
            log.error("the aliases stay as they were: %s", damage)  # noqa: TRY400 - somebody's editor, no bug of ours
            return
        default = self._default(targets, given)
        meant = {alias: self._served.get(target) for alias, target in targets.items()}
        meant |= dict.fromkeys(DEFAULT_NAMES, default)
        self._aliases = {alias: each for alias, each in meant.items() if each and alias not in self._served}

    def _default(self, targets: dict[str, str], given: Served | None) -> Served | None:
        if (chosen := read_choice(self._models_folder)) is not None:
            return self._served.get(chosen)
        if self._given is not None:
            return given
        writers = [name for name, each in self._served.items() if each.classifier is None]
        name = default_name(targets, writers or list(self._served))
        return None if name is None else self._served.get(name)

    def _examinations(self) -> list[tuple[str, Examined]]:
        found = []
        for name in registered_names(self._models_folder):
            try:
                stamp = stamp_of(self._models_folder / name)
            except OSError:  # it is being removed
                continue
            known = self._examined.get(name)
            found.append((name, known if known and known.stamp == stamp else self._examine(name, stamp)))
        return found

    def _examine(self, name: str, stamp: Stamp) -> Examined:
        try:
            info = show_model(name, self._models_folder)
            created = int((self._models_folder / name).stat().st_mtime)
        except (SmeltError, OSError):  # it is being removed
            return Examined(stamp, None)
        has_shape = info.config is not None or (info.classifier is not None and info.classifier.labels)
        if not has_shape or info.tokenizer is None:
            return Examined(stamp, None)
        folder = self._models_folder / name
        served = Served(name, created, info.config, info.num_bytes, folder, classifier=info.classifier)
        return Examined(stamp, self._as_adapter(served) if is_adapter(info.folder) else served)

    def _as_adapter(self, served: Served) -> Served | None:
        """How an adapter is served: with the model that it changes; None where that is none of the registered."""
        assert served.folder is not None, "it was found there"
        base = base_of(served.folder)
        name = name_at(base, self._models_folder)
        adapter = f"{self._models_folder.name}/{served.name}"
        return None if name is None else replace(served, folder=base, base=name, adapter=adapter)

    def _read_given(self) -> Served | None:
        if self._given is None:
            return None
        name = served_name(self._given, self._models_folder)
        if is_registered(self._given, self._models_folder):
            return self._examined[name].served if name in self._examined else None
        path = Path(self._given).expanduser()
        if not path.exists():  # a name on the hub
            return Served(name, 0)
        try:
            folder = model_in(path)
            created = int(folder.stat().st_mtime)
            if folder.is_file():
                return Served(name, created)
            if (shape := classifier_in(base_of(folder))) is not None:
                return Served(name, created, folder=folder, classifier=shape)
            return Served(name, created, read_config(base_of(folder)), folder=folder)
        except (SmeltError, OSError):  # a run that has not saved yet
            return None

    def _unknown(self, name: str) -> str:
        if is_registered(name, self._models_folder):
            return (
                f"the model {name!r} is damaged, or an encoder that has not learned any labels yet; smelt models show "
                f"{name} says which"
            )
        names = sorted(self._served)
        if name in DEFAULT_NAMES and names:
            return f"there is no default model; choose it: smelt models alias {DEFAULT} NAME; there are: {_told(names)}"
        close = difflib.get_close_matches(name, [*names, *self._aliases], n=3)
        near = f"did you mean {' or '.join(close)}? " if close else ""
        return f"no model {name!r} is served; {near}there are: {_told(names) or 'none yet (smelt models import)'}"


def _told(names: list[str]) -> str:
    return ", ".join(names[:MAX_NAMES_TOLD]) + (", ..." if len(names) > MAX_NAMES_TOLD else "")


def read_choice(models_folder: Path) -> str | None:
    """The default model that was chosen while the server runs, if one was."""
    try:
        chosen = json.loads((models_folder / CHOICE_FILE).read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return chosen if isinstance(chosen, str) else None


def forget_choice(models_folder: Path) -> None:
    """A new server begins with the model that it was given."""
    (models_folder / CHOICE_FILE).unlink(missing_ok=True)


def served_name(name_or_folder: str, models_folder: Path) -> str:
    """What clients and workers call a model that `smelt serve` was given."""
    if is_registered(name_or_folder, models_folder):
        return name_or_folder
    return Path(name_or_folder).expanduser().absolute().name
