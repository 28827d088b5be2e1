"""Weights that sessions have saved: found by path, listed, published, kept for a while, copied, removed; knows no HTTP.

A path is tinker://MODEL_ID/TYPE/NAME. Whoever does not own weights sees them only when they are public.
"""

import asyncio
import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

from sqlalchemy import Connection, Engine

from smelt.control.adapters import WEIGHTS_NAME, trained_as
from smelt.control.sessions import ask
from smelt.errors import AlreadyExists, InvalidInput, NotFound
from smelt.storage import records, session_rows
from smelt.storage.records import SavedWeights, Session, TrainingModel
from smelt.storage.writer import Writer

SCHEME = "tinker://"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=+@,-]{0,127}")
MIN_TTL_S, MAX_TTL_S = 3600, 10 * 366 * 86400

Type = Literal["weights", "sampler_weights", "external_weights"]
TYPES: tuple[Type, ...] = ("weights", "sampler_weights", "external_weights")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Found:
    """Weights, and the model that they are of. `is_saved`: they are there now."""

    weights: SavedWeights
    model: TrainingModel
    is_saved: bool

    @property
    def is_registered(self) -> bool:
        """Whether these are an adapter that no session here has trained."""
        return not self.model.session_id


def path_of(weights: SavedWeights) -> str:
    """What clients call them."""
    return f"{SCHEME}{weights.model_id}/{weights.type}/{weights.name}"


def folder_of(model_id: str, *rest: str) -> str:
    """A folder of a session, relative to the home folder."""
    return "/".join(["sessions", model_id.replace(":", "_"), *rest])


def parse_path(path: str) -> tuple[str, str, str]:
    """(model id, type, name) of a path. InvalidInput says what one looks like."""
    parts = path.removeprefix(SCHEME).split("/")
    if not path.startswith(SCHEME) or len(parts) != 3 or parts[1] not in TYPES:
        raise InvalidInput(f"{path[:200]!r} is no path of weights; write tinker://MODEL_ID/weights/NAME", "path")
    return parts[0], parts[1], parts[2]


def check_name(name: str) -> None:
    """InvalidInput where weights cannot be called so."""
    if not NAME.fullmatch(name):
        raise InvalidInput(
            f"weights cannot be called {name[:200]!r}: use up to 128 letters, digits and . _ = + @ , -", "path"
        )


def expiry(ttl_s: int | None, now: float) -> float | None:
    """When weights that live so long expire. InvalidInput beyond an hour to ten years."""
    if ttl_s is None:
        return None
    if not MIN_TTL_S <= ttl_s <= MAX_TTL_S:
        raise InvalidInput(f"ttl_seconds must be from {MIN_TTL_S} (an hour) to ten years, not {ttl_s}", "ttl_seconds")
    return now + ttl_s


def claim(connection: Connection, weights: SavedWeights, *, overwrite: bool) -> None:
    """Take a name for weights that a future will save. AlreadyExists where others have it and may not be replaced."""
    found = session_rows.any_weights(connection, weights.model_id, weights.type, weights.name)
    if found is None:
        records.add(connection, weights)
        return
    known, state = found
    if not overwrite and state not in ("failed", "cancelled"):
        raise AlreadyExists(f"{path_of(weights)} exists already; choose another name, or remove it first")
    records.replace(connection, replace(weights, id=known.id))


class WeightsStore:
    """The saved weights of every owner, in folders below the home folder, and adapters among the registered models."""

    def __init__(self, database: Engine, writer: Writer, home: Path, models_folder: Path) -> None:
        self._database = database
        self._writer = writer
        self._home = home
        self._models_folder = models_folder

    async def find(self, owner: str, path: str) -> Found:
        """Weights that the owner may read. InvalidInput, NotFound."""
        place = parse_path(path)
        found = await self._ask(lambda connection: _found(connection, *place))
        if found is None and place[1:] == ("sampler_weights", WEIGHTS_NAME):
            found = await asyncio.to_thread(self._registered, place[0])
        if found is None or not (found.weights.owner == owner or found.weights.is_public) or _is_over(found.weights):
            raise NotFound(f"there are no weights {path!r}")
        return found

    async def find_saved(self, owner: str, path: str) -> Found:
        """The same, where they must be there already."""
        found = await self.find(owner, path)
        if not found.is_saved:
            raise NotFound(f"{path} is not saved yet; wait for the result of saving it")
        return found

    async def page(
        self, limit: int, offset: int, owner: str | None = None, model_id: str | None = None
    ) -> tuple[list[SavedWeights], int]:
        """Weights that are there, newest first, and how many there are."""
        return await self._ask(partial(_page, limit=limit, offset=offset, owner=owner, model_id=model_id))

    async def size(self, weights: SavedWeights) -> int | None:
        """Bytes of their files; None where they are gone."""
        return await asyncio.to_thread(_size, self._home / weights.folder)

    async def newest(self, model_id: str, kind: Type) -> SavedWeights | None:
        """The newest weights of a type that a model has saved and that are there."""
        found, _ = await self._ask(partial(_page, limit=1, offset=0, owner=None, model_id=model_id, kind=kind))
        return found[0] if found else None

    async def has_public(self, model_id: str) -> bool:
        """Whether a model has saved weights that everybody may read."""
        return await self._ask(partial(session_rows.has_public_weights, model_id=model_id))

    async def files(self, weights: SavedWeights) -> list[str]:
        """The names of their files, sorted. NotFound where they are gone."""
        try:
            return sorted(await asyncio.to_thread(os.listdir, self._home / weights.folder))
        except FileNotFoundError:
            raise NotFound(f"the files of {path_of(weights)} are gone") from None

    async def file(self, weights_id: str, name: str) -> Path:
        """Where a file of weights lies, whoever owns them. NotFound."""
        found = await self._ask(lambda connection: records.of_all_owners(connection, SavedWeights, id=weights_id))
        path = self._home / found[0].folder / name if found else None
        if path is None or not await asyncio.to_thread(path.is_file):
            raise NotFound("this file is gone")
        return path

    async def change(self, owner: str, path: str, **values: Any) -> None:
        """Publish weights or take that back, or say when they expire; only their owner may. NotFound."""
        found = await self._own(owner, path)
        await self._write(partial(records.replace, record=replace(found.weights, **values)))

    async def remove(self, owner: str, path: str) -> None:
        """Remove weights, and their files unless a copy shares them; only their owner may. NotFound."""
        await self._remove((await self._own(owner, path)).weights)

    async def remove_expired(self) -> int:
        """Remove all whose time is over; how many."""
        expired = await self._ask(partial(session_rows.expired_weights, now=time.time()))
        for weights in expired:
            await self._remove(weights)
        return len(expired)

    async def copy(self, owner: str, path: str, session: Session, number: int, ttl_s: int | None) -> str:
        """The path of a copy, in a model of its own that cannot be trained. The same session and number: the same copy.

        The files are shared. NotFound, InvalidInput.
        """
        found = await self.find_saved(owner, path)
        now = time.time()
        model_id = f"{session.id}:train:{number}"
        model = replace(
            found.model, owner=owner, id=model_id, created=now, session_id=session.id, number=number, unloaded=now
        )
        weights = replace(
            found.weights, owner=owner, id=records.new_id(), created=now, model_id=model_id, future_id=None,
            is_public=False, expires=expiry(ttl_s, now),
        )  # fmt: skip

        def write(connection: Connection) -> None:
            if not records.find(connection, Session, owner, id=session.id):
                records.add(connection, session)
            if session_rows.any_model(connection, model_id) is None:
                records.add(connection, model)
                records.add(connection, weights)

        await self._write(write)
        return path_of(weights)

    def _registered(self, name: str) -> Found | None:
        registered = trained_as(name, self._models_folder)
        return None if registered is None else Found(registered[1], registered[0], is_saved=True)

    async def _own(self, owner: str, path: str) -> Found:
        found = await self.find_saved(owner, path)
        if found.weights.owner != owner:
            raise NotFound(f"there are no weights {path!r} of yours")
        return found

    async def _remove(self, weights: SavedWeights) -> None:
        """The row first: what has no row cannot be asked for."""

        def write(connection: Connection) -> bool:
            records.delete(connection, SavedWeights, weights.owner, weights.id)
            return session_rows.is_folder_used(connection, weights.folder)

        if not await self._write(write):
            await asyncio.to_thread(shutil.rmtree, self._home / weights.folder, ignore_errors=True)

    async def _ask(self, run: Callable[[Connection], T]) -> T:
        return await asyncio.to_thread(ask, self._database, run)

    async def _write(self, run: Callable[[Connection], T]) -> T:
        return await asyncio.wrap_future(self._writer.write(run))


def copy_session(owner: str, project_id: str, key: str) -> Session:
    """The session of a copy that has none; the same key, the same session."""
    session_id = hashlib.sha256(f"copy {owner} {key}".encode()).hexdigest()[:32]
    return Session(owner=owner, id=session_id, project_id=project_id, finished=time.time())


def _found(connection: Connection, model_id: str, kind: str, name: str) -> Found | None:
    model = session_rows.any_model(connection, model_id)
    found = session_rows.any_weights(connection, model_id, kind, name)
    if model is None or found is None:
        return None
    weights, state = found
    return Found(weights, model, weights.future_id is None or state == "done")


def _page(
    connection: Connection,
    limit: int,
    offset: int,
    owner: str | None,
    model_id: str | None,
    kind: Type | None = None,
) -> tuple[list[SavedWeights], int]:
    equal = {"owner": owner, "model_id": model_id, "type": kind}
    given = {name: value for name, value in equal.items() if value is not None}
    return session_rows.weights_page(connection, time.time(), limit, offset, given)


def _is_over(weights: SavedWeights) -> bool:
    return weights.expires is not None and weights.expires <= time.time()


def _size(folder: Path) -> int | None:
    try:
        return sum(entry.stat().st_size for entry in os.scandir(folder) if entry.is_file())
    except FileNotFoundError:
        return None
