"""A model server that writes what a test says, and what the application stands on around it."""

import asyncio
import json
import struct
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import msgspec

from gated import services_in
from smelt.api.services import Services
from smelt.control.model_server import WorkerInfo
from smelt.data.characters import ByteTokenizer
from smelt.data.chat_format import ChatFormat
from smelt.data.chat_training import examples_data
from smelt.storage.futures import Ledger
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
from smelt.transport.tinker_wire import encode_data
from smelt.types import TokenLogprob

Script = Callable[[Generate], AsyncGenerator[str | TextChunk | Finish, None]]

CONTEXT = 48  # tokens of the served model
WIDTH = 2  # of the vectors of its embeddings
NUM_PROMPT, NUM_CACHED = 3, 2  # tokens of every prompt


class Scripted:
    """Implements ModelServer. A script gives texts, each of them one token, and may end with a Finish or an error.

    Each sample of a request has its run of the script, one after the other; where log-probabilities are asked for, a
    token has had the alternatives "x", "xx", ... Texts are embedded as (their length, -1).
    """

    workers: list[WorkerInfo] = []

    def __init__(self, script: Script, ledger: Ledger | None = None) -> None:
        self.script = script
        self.asked: list[Generate] = []
        self.embedded: list[Embed] = []
        self.rendered: list[Render] = []
        self.classified: list[Classify] = []
        self.num_running = 0
        self.num_written = 0
        self._ledger = ledger

    async def generate(self, request: Generate) -> AsyncGenerator[TextChunk | Finish, None]:
        self.loop = asyncio.get_running_loop()
        self.asked.append(request)
        self.num_running += 1
        try:
            for index in range(request.num_samples):
                async for piece in self._sample(request, index):
                    yield piece
        finally:
            self.num_running -= 1

    async def _sample(self, request: Generate, index: int) -> AsyncGenerator[TextChunk | Finish, None]:
        num_tokens = 0
        async for piece in self.script(request):
            if isinstance(piece, Finish):
                yield piece if piece.failure else msgspec.structs.replace(piece, index=index)
                return
            num_tokens += 1
            self.num_written += 1
            if isinstance(piece, TextChunk):
                yield msgspec.structs.replace(piece, index=index)
            else:
                logprobs = _logprobs(piece, num_tokens, request.params.num_logprobs)
                yield TextChunk(request.request_id, piece, (num_tokens,), index, logprobs)
        reason = "length" if num_tokens >= request.params.max_tokens else "stop"
        yield Finish(
            request.request_id, reason, NUM_PROMPT, num_tokens, index=index, num_cached_tokens=NUM_CACHED + index
        )

    async def embed(self, request: Embed) -> tuple[Embedded, Finish]:
        self.embedded.append(request)
        vectors = struct.pack(
            f"<{WIDTH * len(request.inputs)}f", *[f for text in request.inputs for f in (len(text), -1)]
        )
        num_tokens = sum(map(len, request.inputs))
        return Embedded(request.request_id, vectors, WIDTH), Finish(request.request_id, "stop", num_tokens, 0)

    async def render(self, request: Render) -> Rendered:
        """By bytes, as a worker whose model has no template would."""
        self.rendered.append(request)
        chat_format = ChatFormat.of(None, ByteTokenizer())
        return Rendered(request.request_id, encode_data(examples_data(chat_format, request.examples, CONTEXT, 257)))

    async def classify(self, request: Classify) -> Classified:
        """Texts of more than three characters are long, as sure as they have characters."""
        self.classified.append(request)
        long = [1 - 1 / (1 + max(0, len(text) - 3)) for text in request.texts]
        flat = [share for each in long for share in (each, 1 - each)]
        return Classified(request.request_id, ("long", "short"), struct.pack(f"<{len(flat)}f", *flat))

    async def load_model(self, model: str) -> None:
        self.workers = [replace(worker, models=(*worker.models, model)) for worker in self.workers]

    async def unload_model(self, model: str) -> int:
        held = [worker.models for worker in self.workers]
        self.workers = [
            replace(worker, models=tuple(name for name in worker.models if name != model)) for worker in self.workers
        ]
        return sum(model in models for models in held)

    async def cancel(self, owner: str, future_id: str) -> bool:
        assert self._ledger is not None
        return await self._ledger.cancel(owner, future_id)


def _logprobs(text: str, token_id: int, num: int | None) -> tuple[TokenLogprob, ...]:
    if num is None:
        return ()
    likely = tuple(TokenLogprob(100 + place, b"x" * place, -place / 2) for place in range(1, num + 1))
    return (TokenLogprob(token_id, text.encode(), -0.25, likely),)


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
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_type": "gpt2", "vocab_size": 257, "n_positions": CONTEXT, "n_layer": 1, "n_head": 1, "n_embd": 8}
    (folder / "config.json").write_text(json.dumps(config))
    with services_in(home) as services:
        model_server = Scripted(script, services.ledger)
        yield replace(services, model_server=model_server, default_model=str(folder)), model_server
