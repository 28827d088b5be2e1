"""Somebody who speaks Tinker's protocol to the application, byte by byte, and a worker that answers."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from gated import client_of
from scripted import scripted
from scripted_training import ScriptedWorker
from smelt.api.app import create_app
from smelt.api.services import Services
from smelt.transport import tinker_pb2 as pb

PROTOBUF = {"content-type": "application/x-protobuf"}


ADAM = {"learning_rate": 1e-3}


SAMPLE = {"prompt": {"chunks": [{"type": "encoded_text", "tokens": [1, 2]}]}, "sampling_params": {"max_tokens": 2}}


@pytest.fixture
def services(tmp_path: Path) -> Iterator[Services]:
    with scripted(tmp_path / "home") as (services, _):
        yield services


class Client:
    """Somebody who speaks to the API."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self.http = http

    async def post(self, path: str, body: Any = None, **headers: str) -> httpx.Response:
        return await self.http.post(f"/api/v1/{path}", json={} if body is None else body, headers=headers)

    async def get(self, path: str) -> httpx.Response:
        return await self.http.get(f"/api/v1/{path}")

    async def session(self) -> str:
        return str((await self.post("create_session", {"tags": []})).json()["session_id"])

    async def model(self, session: str | None = None, number: int = 0) -> str:
        session = session or await self.session()
        body = {"session_id": session, "model_seq_id": number, "base_model": "tiny", "lora_config": {"rank": 4}}
        return str((await self.post("create_model", body)).json()["model_id"])

    async def forward_backward(
        self, model_id: str, seq: int, loss: str = "cross_entropy", num: int = 2
    ) -> httpx.Response:
        return await self.send(forward_backward(model_id, seq, loss, num))

    async def send(self, body: bytes, **headers: str) -> httpx.Response:
        return await self.http.post("/api/v1/forward_backward", content=body, headers=PROTOBUF | headers)

    async def optim_step(self, model_id: str, seq: int, **adam: Any) -> httpx.Response:
        return await self.post("optim_step", {"model_id": model_id, "seq_id": seq, "adam_params": ADAM | adam})

    async def result(self, promised: httpx.Response) -> httpx.Response:
        assert promised.status_code == 200, promised.text
        return await self.post("retrieve_future", {"request_id": promised.json()["request_id"]})


def forward_backward(model_id: str, seq: int, loss: str = "cross_entropy", num: int = 2) -> bytes:
    tokens = np.arange(num, dtype="<i4").tobytes()
    targets = pb.Tensor(dense=np.arange(num, dtype="<i8").tobytes(), dtype=pb.DTYPE_INT64, shape=[num])
    datum = pb.Datum(
        model_input=[pb.Chunk(encoded_text=pb.EncodedTextChunk(tokens=tokens))],
        loss_fn_inputs={"target_tokens": targets},
    )
    return pb.ForwardBackwardRequest(model_id=model_id, seq_id=seq, data=[datum], loss_fn=loss).SerializeToString()


@asynccontextmanager
async def working(services: Services) -> AsyncIterator[ScriptedWorker]:
    """A worker, while the block runs."""
    worker = ScriptedWorker(services.ledger, services.settings.home)
    task = asyncio.create_task(worker.run())
    try:
        yield worker
    finally:
        task.cancel()
        await asyncio.wait([task])


@pytest.fixture
async def client(services: Services) -> AsyncIterator[Client]:
    async with client_of(create_app(services)) as http:
        yield Client(http)


def error_of(answer: httpx.Response) -> str:
    """Why a promise has failed, through the user's fault."""
    assert answer.status_code == 200
    assert answer.json()["category"] == "user"
    return str(answer.json()["error"])


def sampling(model_id: str, number: int = 3) -> dict[str, Any]:
    return {"session_id": model_id.partition(":")[0], "sampling_session_seq_id": number, "base_model": "tiny"}
