"""Runs as they go on: new metrics, log lines and states, told to many from one tail; knows no HTTP and no torch.

A tail wakes when the run's folder changes. A lock that is let go leaves no trace in a folder, so
each state is looked at every second as well.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar
from weakref import WeakValueDictionary

import msgspec

from smelt.configs import RUN_LOG, RUN_METRICS
from smelt.control.folder_watch import FolderWatch
from smelt.control.run_folders import REGISTRY
from smelt.control.run_metrics import LineFile, parsed, text_of
from smelt.control.run_requests import RunRequests
from smelt.control.runs import RunStatus
from smelt.errors import NotFound

logger = logging.getLogger(__name__)

TICK_S = 1.0
SILENCE_S = 15.0
MAX_WAITING = 256  # events that a slow reader may be behind


@dataclass(frozen=True, slots=True)
class RunChange:
    """Something new.

    "metrics" has the new events of metrics.jsonl, "log" lines of text, "state" a RunStatus, "runs" those RunStatus
    that have changed, "removed" the last RunStatus of a run whose folder is gone. "reset": what was sent before is
    void, for the run was resumed from a checkpoint, or the reader was too slow; read the curves again. "end" is the
    last one.
    """

    kind: Literal["metrics", "log", "state", "runs", "removed", "reset", "end"]
    data: Any
    cursor: str = ""  # with it one can go on after this event


Reader = TypeVar("Reader", "RunReader", "ListReader")


class Tail(Generic[Reader]):
    """Reads what is new, once, and tells everybody who follows.

    One task does all the reading. It is never cancelled, for a read that is half done would be lost to the others;
    it ends by itself when nobody is left.
    """

    def __init__(self, reader: Reader, watch: FolderWatch, folder: Path) -> None:
        self.reader: Reader = reader
        self._watch = watch
        self._folder = folder
        self._joining: dict[asyncio.Queue[RunChange], str | None] = {}
        self._queues: set[asyncio.Queue[RunChange]] = set()
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @contextmanager
    def joined(self, cursor: str | None = None) -> Iterator[asyncio.Queue[RunChange]]:
        """A queue that begins with how things stand and goes on with what is new, without a gap or a repetition."""
        queue: asyncio.Queue[RunChange] = asyncio.Queue(MAX_WAITING)
        self._joining[queue] = cursor
        self._changed.set()
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run())
            self._task.add_done_callback(self._end)
        try:
            yield queue
        finally:
            self._joining.pop(queue, None)
            self._queues.discard(queue)

    async def _run(self) -> None:
        with self._watch.on(self._folder) as self._changed:
            while self._queues or self._joining:
                self._changed.clear()
                for event in await self.reader.read():
                    for queue in self._queues:
                        _put(queue, event)
                for queue, cursor in list(self._joining.items()):
                    await self._begin(queue, cursor)
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._changed.wait(), TICK_S)

    async def _begin(self, queue: asyncio.Queue[RunChange], cursor: str | None) -> None:
        for event in await asyncio.to_thread(self.reader.first, cursor):
            _put(queue, event)
        if queue in self._joining:  # it may have left meanwhile
            del self._joining[queue]
            self._queues.add(queue)

    def _end(self, task: asyncio.Task[None]) -> None:
        """Where reading failed nobody must wait for more: they come back, and are told why it fails."""
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("following runs in %s failed", self._folder, exc_info=error)
            for queue in (*self._queues, *self._joining):
                _put(queue, RunChange("end", {}))


def _put(queue: asyncio.Queue[RunChange], event: RunChange) -> None:
    """Hand an event over; a reader that is too far behind loses what it has not read, and is told so."""
    if queue.full():
        while not queue.empty():
            queue.get_nowait()
        queue.put_nowait(RunChange("reset", {}, event.cursor))
    queue.put_nowait(event)


class RunReader:
    """What is new in one run since it was last read."""

    def __init__(self, requests: RunRequests, run_id: str, out_dir: Path) -> None:
        self.status: RunStatus | None = None
        self._requests = requests
        self._run_id = run_id
        self._files = [LineFile(out_dir / name) for name in (RUN_METRICS, RUN_LOG)]

    @property
    def cursor(self) -> str:
        """Where reading has come to: that of the curves, a slash, that of the log."""
        return "/".join(file.cursor for file in self._files)

    async def read(self) -> list[RunChange]:
        """New metrics and lines, then the state if it is another."""
        try:
            status = await self._requests.status(self._run_id)
        except NotFound:
            return [RunChange("removed", self.status)]
        events = await asyncio.to_thread(self._read_files)
        if status != self.status:
            self.status = status
            events.append(RunChange("state", status, self.cursor))
        return events

    def _read_files(self) -> list[RunChange]:
        added = [file.read() for file in self._files]
        if None in added:
            for file in self._files:
                file.read()
            return [RunChange("reset", {}, self.cursor)]
        return told(added[0] or [], added[1] or [], self.cursor)

    def first(self, cursor: str | None) -> list[RunChange]:
        """How the run stands, and what lies between a reader's cursor and here, for one who comes back."""
        if self.status is None:  # its folder was removed just now
            return [RunChange("removed", None)]
        state = RunChange("state", self.status, self.cursor)
        return [state, *self._since(cursor)] if cursor else [state]

    def _since(self, cursor: str) -> list[RunChange]:
        try:
            files = [LineFile(file.path, part) for file, part in zip(self._files, cursor.split("/"), strict=True)]
        except ValueError:
            return [RunChange("reset", {}, self.cursor)]
        added = [file.read(until=ours.offset) for file, ours in zip(files, self._files, strict=True)]
        if None in added:
            return [RunChange("reset", {}, self.cursor)]
        return told(added[0] or [], added[1] or [], self.cursor)


def told(metrics: list[bytes], log: list[bytes], cursor: str) -> list[RunChange]:
    """New lines as events."""
    values = [msgspec.json.decode(line) for line in metrics if parsed(line) is not None]
    events = [RunChange("metrics", values, cursor)] if values else []
    return [*events, RunChange("log", text_of(log), cursor)] if log else events


class ListReader:
    """Which runs are new, changed or gone since the list was last read."""

    def __init__(self, requests: RunRequests) -> None:
        self.known: dict[str, RunStatus] = {}
        self._requests = requests

    def first(self, _cursor: str | None) -> list[RunChange]:
        """All runs."""
        return [RunChange("runs", list(self.known.values()))]

    async def read(self) -> list[RunChange]:
        """The changed ones together, then each that is gone."""
        now = {status.id: status for status in await self._requests.all()}
        changed = [status for status in now.values() if self.known.get(status.id) != status]
        removed = [status for status in self.known.values() if status.id not in now]
        self.known = now
        events = [RunChange("runs", changed)] if changed else []
        return [*events, *(RunChange("removed", status) for status in removed)]


class RunFollowers:
    """Everybody who follows runs of one server."""

    def __init__(self, requests: RunRequests) -> None:
        self._requests = requests
        self._watch = FolderWatch()
        self._list_tail: Tail[ListReader] = Tail(ListReader(requests), self._watch, requests.runs.folder / REGISTRY)
        self._tails: WeakValueDictionary[str, Tail[RunReader]] = WeakValueDictionary()

    async def follow(
        self, run_id: str, owner: str | None = None, cursor: str | None = None
    ) -> AsyncGenerator[RunChange | None, None]:
        """A run's state, then what is new in it: after a cursor, else after now. None after each long silence.

        It ends when the run's folder is removed. NotFound where the owner has no run of that id.
        """
        _, out_dir = await asyncio.to_thread(self._requests.runs.find, run_id, owner)
        tail = self._tails.get(run_id)
        if tail is None:
            tail = Tail(RunReader(self._requests, run_id, out_dir), self._watch, out_dir)
            self._tails[run_id] = tail
        with tail.joined(cursor) as queue:
            while True:
                event = await _next(queue)
                if event is not None and event.kind == "end":
                    return
                yield event
                if event is not None and event.kind == "removed":
                    return

    async def follow_all(self, owner: str | None = None) -> AsyncGenerator[RunChange | None, None]:
        """All runs of an owner, then those that are new, changed or removed. None after each long silence."""
        with self._list_tail.joined() as queue:
            is_first = True
            while True:
                event = await _next(queue)
                if event is not None and event.kind == "reset":  # the list as it is now says it all
                    (event,) = self._list_tail.reader.first(None)
                if event is None:
                    yield None
                elif event.kind == "end":
                    return
                elif event.kind == "removed":
                    if owner in (None, event.data.owner):
                        yield event
                elif (visible := [status for status in event.data if owner in (None, status.owner)]) or is_first:
                    yield RunChange("runs", visible)
                    is_first = False


async def _next(queue: asyncio.Queue[RunChange]) -> RunChange | None:
    try:
        return await asyncio.wait_for(queue.get(), SILENCE_S)
    except TimeoutError:
        return None
