"""A client of the ledger that trains in a lane, and a whole worker with a tiny model, in this process."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from session_worker import load_tiny
from smelt.cluster.worker import Worker
from smelt.control.workers import Workers
from smelt.inference.service import TextModel
from smelt.models.loading import load_model
from smelt.storage import lanes as turns
from smelt.storage.futures import Future, Ledger
from smelt.storage.transitions import Submission
from smelt.transport import tinker_pb2 as pb
from smelt.transport.operations import (
    SAMPLE,
    CreateModel,
    OptimStep,
    Sample,
    Sampler,
    SaveWeights,
)
from smelt.types import SamplingParams
from spine import letting_in

LANE = "s:train:0"


FOLDER = "sessions/s_train_0"


PROMPT = tuple(range(40, 50))


def loss_body(lane: str, seed: int, num_data: int = 2, loss: str = "cross_entropy", tokens: int = 12) -> bytes:
    """A request for a loss, with data that come of the seed."""
    rng = np.random.default_rng(seed)
    data = []
    for _ in range(num_data):
        ids = rng.integers(0, 128, tokens + 1)
        chunk = pb.Chunk(encoded_text=pb.EncodedTextChunk(tokens=ids[:-1].astype("<i4").tobytes()))
        targets = pb.Tensor(dense=ids[1:].astype("<i8").tobytes(), dtype=pb.DTYPE_INT64, shape=[tokens])
        weights = pb.Tensor(dense=np.ones(tokens, "<f4").tobytes(), dtype=pb.DTYPE_FLOAT32, shape=[tokens])
        data.append(pb.Datum(model_input=[chunk], loss_fn_inputs={"target_tokens": targets, "weights": weights}))
    message = pb.ForwardBackwardRequest(model_id=lane, seq_id=1, data=data, loss_fn=loss)
    return message.SerializeToString(deterministic=True)


class Client:
    """Puts a session's operations into the ledger, one after the other."""

    def __init__(self, ledger: Ledger, lane: str = LANE) -> None:
        self.ledger, self.lane, self.seq = ledger, lane, 0

    async def submit(self, kind: str, body: Any) -> str:
        encoded = body if isinstance(body, bytes) else msgspec.msgpack.encode(body)
        seq, self.seq = self.seq, self.seq + 1
        return await self.ledger.accept(Submission("ann", kind, f"{seq}", encoded, self.lane, seq, 0))

    async def open(self, rank: int = 4, seed: int = 1) -> str:
        return await self.submit("create_model", CreateModel("tiny", rank, seed))

    async def loss(self, seed: int, **options: Any) -> str:
        return await self.submit("forward_backward", loss_body(self.lane, seed, **options))

    async def step(self) -> str:
        return await self.submit("optim_step", OptimStep(learning_rate=0.05))

    async def round(self, seed: int) -> list[str]:
        return [await self.loss(seed), await self.loss(seed + 100), await self.step()]

    async def save(self, name: str) -> str:
        return await self.submit("save_weights", SaveWeights(f"{FOLDER}/weights/{name}", f"tinker://{name}"))

    async def results(self, futures: list[str]) -> list[bytes | None]:
        found = [await outcome(self.ledger, future) for future in futures]
        assert [each.state for each in found] == ["done"] * len(found), found
        return [each.result for each in found]


async def outcome(ledger: Ledger, future_id: str) -> Future:
    future = await ledger.wait("ann", future_id, 30)
    assert future.state in ("done", "failed", "cancelled"), future
    return future


async def sample(ledger: Ledger, sampler: Sampler, **settings: Any) -> pb.SampleResponse:
    params = SamplingParams(**{"max_tokens": 5, "temperature": 1.0, "seed": 3, "ignore_eos": True, **settings})
    body = msgspec.msgpack.encode(Sample(sampler, PROMPT, params))
    future = await outcome(ledger, await ledger.accept(Submission("ann", SAMPLE, "f", body, None, None)))
    assert future.state == "done", future
    response = pb.SampleResponse()
    response.ParseFromString(future.result or b"")
    return response


@pytest.fixture
def workers(ledger: Ledger) -> Workers:
    return Workers(ledger, patience_s=60)


@asynccontextmanager
async def serving(workers: Workers, ledger: Ledger, address: Path) -> AsyncIterator[None]:
    """Workers may dial in while the block runs; the next one begins as the server's next start would."""
    async with letting_in(workers, ledger, address):
        yield
    await asyncio.wrap_future(ledger._writer.write(turns.recover))


def load_model_of(home: Path, name: str) -> TextModel:
    """The tiny model, or one that a session has made of it."""
    if not name.startswith("sessions/"):
        return load_tiny(name)
    model, tokenizer = load_model(home / name, torch.float32, torch.device("cpu"))
    assert tokenizer is not None
    return TextModel(model, tokenizer)


@asynccontextmanager
async def working(address: Path, home: Path) -> AsyncIterator[Worker]:
    worker = Worker(address, partial(load_model_of, home), "cpu", grace_s=0.1)
    worker.keep_sessions(home)
    running = asyncio.create_task(worker.run())
    try:
        yield worker
    finally:
        worker.stop()
        worker.stop()
        await running
