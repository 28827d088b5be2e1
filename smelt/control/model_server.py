"""ModelServer: who computes answers, as the API sees it: workers in a server, a fake in a test; knows no HTTP."""

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Protocol

from smelt.transport.messages import (
    Classified,
    Classify,
    Embed,
    Embedded,
    Finish,
    Generate,
    Render,
    Rendered,
    TextChunk,
)
from smelt.types import ModelLoad


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """A worker that is connected now."""

    name: str
    epoch: int
    device: str
    models: tuple[str, ...]  # loaded, ready to answer
    num_running: int
    num_waiting: int
    model_loads: tuple[ModelLoad, ...] = ()
    num_lent_bytes: int = 0  # of its device's memory, to runs


class ModelServer(Protocol):
    """Answers live requests. What must outlive a crash goes through the ledger instead.

    Each call may raise Unavailable (no worker has come within the patience that a restart needs), Overloaded (they
    have too much to do) and WorkerLost (the worker died on the way).
    """

    def generate(self, request: Generate) -> AsyncGenerator[TextChunk | Finish, None]:
        """Pieces of the answers, and one Finish for each of them; closing the generator cancels the work.

        A Finish that is aborted, maybe with a failure, is the last. Where the worker dies, what came until then is all
        there is.
        """
        ...

    async def embed(self, request: Embed) -> tuple[Embedded, Finish]:
        """Vectors of texts, and the number of tokens. Raises what the work has failed with; cancelling it ends it."""
        ...

    async def render(self, request: Render) -> Rendered:
        """Conversations as data to train on. Raises what is wrong with them; cancelling it ends the work."""
        ...

    async def classify(self, request: Classify) -> Classified:
        """Probabilities of labels for texts. Raises what the work has failed with; cancelling it ends it."""
        ...

    async def load_model(self, model: str) -> None:
        """Have some worker hold a model, and return when it does. Raises why it cannot."""
        ...

    async def unload_model(self, model: str) -> int:
        """Have every worker that holds a model give it up, after its answers; how many did."""
        ...

    async def cancel(self, owner: str, future_id: str) -> bool:
        """Whether a request of the ledger was unfinished and is cancelled now; who works on it stops. NotFound."""
        ...

    @property
    def workers(self) -> list[WorkerInfo]:
        """Who is connected, oldest first."""
        ...
