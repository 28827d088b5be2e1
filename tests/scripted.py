"""A model server that writes what a test says, and what the application stands on around it."""

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from gated import services_in
from smelt.api.services import Services
from smelt.control.model_server import WorkerInfo
from smelt.storage.futures import Ledger
from smelt.transport.messages import Finish, Generate, TextChunk

Script = Callable[[Generate], AsyncGenerator[str | Finish, None]]

CONTEXT = 48  # tokens of the served model


class Scripted:
    """Implements ModelServer. A script gives texts, each of them one token, and may end with a Finish or an error."""

    workers: list[WorkerInfo] = []

    def __init__(self, script: Script, ledger: Ledger | None = None) -> None:
        self.script = script
        self.asked: list[Generate] = []
        self.num_running = 0
        self.num_written = 0
        self._ledger = ledger

    async def generate(self, request: Generate) -> AsyncGenerator[TextChunk | Finish, None]:
        self.loop = asyncio.get_running_loop()
        self.asked.append(request)
        self.num_running += 1
        num_tokens = 0
        try:
            async for piece in self.script(request):
                if isinstance(piece, Finish):
                    yield piece
                    return
                num_tokens += 1
                self.num_written += 1
                yield TextChunk(request.request_id, piece, (num_tokens,))
            reason = "length" if num_tokens >= request.params.max_tokens else "stop"
            yield Finish(request.request_id, reason, 3, num_tokens)
        finally:
            self.num_running -= 1

    async def cancel(self, owner: str, future_id: str) -> bool:
        assert self._ledger is not None
        return await self._ledger.cancel(owner, future_id)


async def words(request: Generate) -> AsyncGenerator[str | Finish, None]:
    """As many words as tokens were asked for, three at most; they name the prompt, or the last message."""
    said = request.messages[-1].content if request.messages else request.prompt
    for word in [f"<{said}>", " two", " three"][: request.params.max_tokens]:
        yield word


async def endless(request: Generate) -> AsyncGenerator[str | Finish, None]:
    while True:
        yield "x"
        await asyncio.sleep(0)


async def silent(request: Generate) -> AsyncGenerator[str | Finish, None]:
    await asyncio.Event().wait()
    yield "never"


@contextmanager
def scripted(home: Path, script: Script = words) -> Iterator[tuple[Services, Scripted]]:
    """(services, their model server) of a server that was given a folder with the model `tiny`."""
    folder = home / "elsewhere" / "tiny"
    folder.mkdir(parents=True)
    config = {"model_type": "gpt2", "vocab_size": 257, "n_positions": CONTEXT, "n_layer": 1, "n_head": 1, "n_embd": 8}
    (folder / "config.json").write_text(json.dumps(config))
    with services_in(home) as services:
        model_server = Scripted(script, services.ledger)
        yield replace(services, model_server=model_server, default_model=str(folder)), model_server
