"""The one thread that writes: what waits together is committed together, with one fsync; knows no table.

A commit waits for the disk, and while it waits more operations arrive; they are the next group. So one operation
alone costs one fsync, and a crowd shares it, without any timer.
"""

import asyncio
import queue
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError, OperationalError

from smelt.errors import StorageError
from smelt.storage.database import WRITES, explained, transaction

MAX_GROUP = 256

T = TypeVar("T")

# Of asyncio where an event loop waits for it, of a thread otherwise.
Answer: TypeAlias = Future[Any] | asyncio.Future[Any]


@dataclass(frozen=True, slots=True)
class Operation:
    """A function of the connection; it may run twice (its first run rolled back), so it changes nothing else."""

    run: Callable[[Connection], Any]
    # Whether its caller may be answered only when it is on the disk.
    durable: bool = True
    answer: Answer = field(default_factory=Future)


class Writer:
    """Runs operations in the order they came, in groups. Call `close` at the end: it finishes what was submitted."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine.execution_options(**{WRITES: True})
        self._queue: queue.SimpleQueue[list[Operation] | None] = queue.SimpleQueue()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="storage-writer", daemon=True)
        self._thread.start()

    def submit(self, operations: Iterable[Operation]) -> None:
        """Queue operations that belong into the same commit; each one's `answer` comes after it."""
        if self._closed:
            raise StorageError("the database is closed: this server is going down")
        self._queue.put(list(operations))

    def write(self, run: Callable[[Connection], T]) -> Future[T]:
        """Queue one durable operation: a future for its result, or for the error it raised."""
        answer: Future[T] = Future()
        self.submit([Operation(run, answer=answer)])
        return answer

    def close(self) -> None:
        """Finish what was submitted, then stop; callable twice."""
        self._closed = True
        self._queue.put(None)
        self._thread.join()

    def _work(self) -> None:
        with self._engine.connect() as connection:
            while (group := self._next_group()) is not None:
                self._commit(connection, group)

    def _next_group(self) -> list[Operation] | None:
        """Wait for work, then take all that is there; None at the end."""
        group = self._queue.get()
        while group is not None and len(group) < MAX_GROUP and not self._queue.empty():
            more = self._queue.get()
            if more is None:
                self._queue.put(None)
                break
            group.extend(more)
        return group

    def _commit(self, connection: Connection, group: list[Operation]) -> None:
        # An operation whose caller has left before it began is left out; from here on it cannot be taken back.
        group = [operation for operation in group if _begins(operation.answer)]
        try:
            results = self._results(connection, group)
        except DBAPIError as error:
            results = [explained(error, self._engine)] * len(group)
        _deliver(list(zip([operation.answer for operation in group], results, strict=True)))

    def _results(self, connection: Connection, group: list[Operation]) -> list[Any]:
        """Each operation's result or error, once the transaction is committed."""
        durable = any(operation.durable for operation in group)
        try:
            with transaction(connection, durable):
                return [operation.run(connection) for operation in group]
        except OperationalError:
            # The disk or the server, and nobody's fault: it is everybody's error.
            raise
        except Exception:  # noqa: BLE001 - whatever it was, the second run gives it to the one it belongs to
            with transaction(connection, durable):
                return [_isolated(connection, operation) for operation in group]


def _isolated(connection: Connection, operation: Operation) -> Any:
    """The result, or the error with everything that the operation wrote undone."""
    try:
        with connection.begin_nested():
            return operation.run(connection)
    except OperationalError:
        raise
    except DBAPIError as error:
        return explained(error, connection.engine)
    except Exception as error:  # noqa: BLE001 - an operation's fault belongs to its caller; this thread must live
        return error


def _begins(answer: Answer) -> bool:
    """Whether the caller is still there."""
    return not answer.cancelled() if isinstance(answer, asyncio.Future) else answer.set_running_or_notify_cancel()


def _deliver(answers: list[tuple[Answer, Any]]) -> None:
    """Give each caller its result; an event loop is woken once for all that it waits for.

    A wake-up for each would hand the interpreter back and forth between the two threads.
    """
    by_loop: dict[asyncio.AbstractEventLoop | None, list[tuple[Answer, Any]]] = {}
    for answer, result in answers:
        loop = answer.get_loop() if isinstance(answer, asyncio.Future) else None
        by_loop.setdefault(loop, []).append((answer, result))
    for loop, settled in by_loop.items():
        if loop is None:
            _settle(settled)
            continue
        with suppress(RuntimeError):  # the loop is closed, and nobody left to be told
            loop.call_soon_threadsafe(_settle, settled)


def _settle(answers: list[tuple[Answer, Any]]) -> None:
    for answer, result in answers:
        if answer.cancelled():
            continue  # the caller left; what it asked for is done all the same
        if isinstance(result, Exception):
            answer.set_exception(result)
        else:
            answer.set_result(result)
