"""ModelServer: who computes answers, as the API sees it: workers in a server, a fake in a test; knows no HTTP."""

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Protocol

from smelt.transport.messages import Finish, Generate, TextChunk


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """A worker that is connected now."""

    name: str
    epoch: int
    device: str
    models: tuple[str, ...]  # loaded, ready to answer
    num_running: int
    num_waiting: int


class ModelServer(Protocol):
    """Answers live requests. What must outlive a crash goes through the ledger instead."""

    def generate(self, request: Generate) -> AsyncGenerator[TextChunk | Finish, None]:
        """Pieces of the answer, then one Finish, which may carry a failure. Closing the generator cancels the work.

        Unavailable: no worker has come within the patience that a restart needs, or they have too much to do.
        WorkerLost: the worker died on the way; what came until then is all there is.
        """
        ...

    async def cancel(self, owner: str, future_id: str) -> bool:
        """Whether a request of the ledger was unfinished and is cancelled now; who works on it stops. NotFound."""
        ...

    @property
    def workers(self) -> list[WorkerInfo]:
        """Who is connected, oldest first."""
        ...
