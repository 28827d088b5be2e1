"""Leases: memory that runs need, which the workers of their machine are told to leave; knows no model and no run.

A launcher's status says what its run needs, and of which device, for as long as its connection lives. Each worker there
hears how much that is in all, unloads idle models until it is free, and lets none come that would take it.
"""

import asyncio
import uuid
from contextlib import suppress

from smelt.control.links import Link
from smelt.errors import SmeltError
from smelt.transport.messages import Lend, Lent


class Leases:
    """`links` are those that are connected now. To be told of each status, and of each link that is gone."""

    def __init__(self, links: list[Link]) -> None:
        self._links = links
        self._tasks: set[asyncio.Task[None]] = set()

    def note(self, link: Link) -> None:
        """Something may have changed: tell those who have to know, beside the caller."""
        behind = [worker for worker in self._links if _is_worker(worker) and self._due(worker) != worker.num_lent]
        waits = link in self._links and link.status.num_needed_bytes > 0
        if behind or waits:
            task = asyncio.create_task(self._settle(behind, link if waits else None))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _settle(self, behind: list[Link], launcher: Link | None) -> None:
        unloaded = await asyncio.gather(*[_lend(worker, self._due(worker)) for worker in behind])
        if launcher is not None:
            with suppress(SmeltError):  # it is gone, and its run with it
                await launcher.send(Lent("", tuple(model for models in unloaded for model in models)))

    def _due(self, worker: Link) -> int:
        """What runs need of a worker's device."""
        return sum(
            link.status.num_needed_bytes
            for link in self._links
            if _machine_of(link) == _machine_of(worker) and link.status.device in ("auto", worker.status.device)
        )


async def _lend(worker: Link, num_bytes: int) -> tuple[str, ...]:
    """Have a worker leave so much to runs; the models that it has unloaded for it."""
    worker.num_lent = num_bytes
    with suppress(SmeltError):  # it is going or gone, and holds nothing any more
        answer = await worker.begin(Lend(uuid.uuid4().hex, num_bytes))
        try:
            lent, _ = await answer.whole()
        finally:
            worker.leave(answer)
        assert isinstance(lent, Lent), "that is what comes of lending"
        return lent.unloaded
    return ()


def _is_worker(link: Link) -> bool:
    return link.connection.role == "worker"


def _machine_of(link: Link) -> str:
    """Who dials in is called by its machine and its process."""
    return link.connection.name.rpartition(":")[0]
