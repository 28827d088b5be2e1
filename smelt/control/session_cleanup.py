"""What sessions leave behind, removed in time: expired weights, samplers nobody asks, logs of models that are over.

Knows no HTTP. Weights that were saved under a name stay until they expire or somebody removes them.
"""

import asyncio
import shutil
import time
from collections import Counter
from functools import partial
from pathlib import Path

from sqlalchemy import Connection, Engine

from smelt.control.post_training import PostTraining
from smelt.control.saved_weights import folder_of
from smelt.control.sessions import NAMED, ask
from smelt.storage import records, session_rows
from smelt.storage.records import SamplerRecord, Session, TrainingModel
from smelt.storage.writer import Writer

GRACE_S = 3600.0  # that a finished session's models and a sampler nobody asks are kept
MAX_SILENCE_S = 7 * 86400.0  # after which a session that never said goodbye counts as finished
NUM_KEPT = 8  # the newest samplers of each model stay, however long nobody asks
ALL = 2**62  # above every seq


class SessionCleanup:
    """`tidy` is to be called every now and then."""

    def __init__(self, training: PostTraining, database: Engine, writer: Writer, home: Path) -> None:
        self._training = training
        self._database = database
        self._writer = writer
        self._home = home
        self._closed: set[str] = set()  # models whose logs are gone

    async def tidy(self) -> None:
        """Remove what is over."""
        await self._training.weights.remove_expired()
        await self._remove_samplers()
        await asyncio.to_thread(self._remove_orphans)
        await self._unload_models()
        await self._forget_logs()

    async def _remove_samplers(self) -> None:
        """Those without a name that nobody has asked for long, but for the newest."""
        num_seen: Counter[str | None] = Counter()
        for sampler in await asyncio.to_thread(ask, self._database, session_rows.ephemeral_samplers):
            num_seen[sampler.lane] += 1
            is_new = num_seen[sampler.lane] <= NUM_KEPT and not await self._is_over(sampler.session_id)
            if is_new or time.time() - sampler.created < GRACE_S:
                continue
            if self._training.samplers.idle_s(sampler.id) >= GRACE_S:
                await self._remove(sampler)

    async def _remove(self, sampler: SamplerRecord) -> None:
        delete = partial(records.delete, kind=SamplerRecord, owner=sampler.owner, record_id=sampler.id)
        await asyncio.wrap_future(self._writer.write(delete))
        self._training.samplers.forget(sampler.id)
        if sampler.folder is not None:
            await asyncio.to_thread(shutil.rmtree, self._home / sampler.folder, ignore_errors=True)

    def _remove_orphans(self) -> None:
        """Folders of samplers that are gone: a worker that did an old operation again has made them anew."""
        known = {sampler.folder for sampler in ask(self._database, session_rows.ephemeral_samplers)}
        for folder in self._home.glob("sessions/*/ephemeral/*"):
            is_old = time.time() - folder.stat().st_mtime >= GRACE_S
            if is_old and str(folder.relative_to(self._home)) not in known:
                shutil.rmtree(folder, ignore_errors=True)

    async def _unload_models(self) -> None:
        for model in await asyncio.to_thread(ask, self._database, _loaded_models):
            if await self._is_over(model.session_id):
                await self._training.models.unload(model)

    async def _forget_logs(self) -> None:
        """Of models that nothing can be asked of any more; their results stay as long as all results do."""
        ask_for = partial(session_rows.unloaded_models, before=time.time() - GRACE_S)
        for model_id in await asyncio.to_thread(ask, self._database, ask_for):
            if model_id not in self._closed:
                await self._training.ledger.forget_log(model_id, ALL)
                snapshots = self._home / folder_of(model_id, "snapshots")
                await asyncio.to_thread(shutil.rmtree, snapshots, ignore_errors=True)
                self._closed.add(model_id)

    async def _is_over(self, session_id: str) -> bool:
        """Whether nobody will come back to a session."""
        [session] = await asyncio.to_thread(
            ask, self._database, partial(records.of_all_owners, kind=Session, id=session_id)
        )
        if session.finished is not None:
            return time.time() - session.finished >= GRACE_S
        if session.project_id == NAMED:
            return False
        return self._training.sessions.silence_s(session_id) >= MAX_SILENCE_S


def _loaded_models(connection: Connection) -> list[TrainingModel]:
    return records.of_all_owners(connection, TrainingModel, unloaded=None)
