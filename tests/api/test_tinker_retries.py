"""Tinker's client over a network that loses answers and repeats requests: each operation is done once, in its order."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import tinker
import torch
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from tinker import types

from scripted_training import ScriptedWorker, training_server

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

NUM_STEPS = 12
LOST, REPEATED = 0.3, 0.2
SOON = [(b"content-type", b"text/plain"), (b"retry-after-ms", b"10")]
SUBMITTING = ("forward_backward", "optim_step", "save_weights_for_sampler", "asample", "create_model")


class Lossy:
    """The application behind a network that loses answers of what is submitted, and brings some requests twice."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._random = random.Random(5)
        self.num_lost = 0
        self.num_repeated = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].rpartition("/")[2] not in SUBMITTING:
            await self._app(scope, receive, send)
            return
        body = await whole(receive)
        if self._random.random() < REPEATED:
            self.num_repeated += 1
            await self._app(fresh(scope), replay(body), into_the_void)
        if self._random.random() < LOST:
            self.num_lost += 1
            await self._app(fresh(scope), replay(body), into_the_void)
            await send({"type": "http.response.start", "status": 502, "headers": SOON})
            await send({"type": "http.response.body", "body": b"lost"})
            return
        await self._app(fresh(scope), replay(body), send)


def fresh(scope: Scope) -> Scope:
    return {**scope, "state": {}}


async def whole(receive: Receive) -> bytes:
    pieces, more = b"", True
    while more:
        message = await receive()
        pieces += message.get("body", b"")
        more = message.get("more_body", False)
    return pieces


def replay(body: bytes) -> Receive:
    async def receive() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    return receive


async def into_the_void(message: Message) -> None:
    """Nobody hears it."""


@pytest.fixture
def lossy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Lossy, ScriptedWorker]]:
    monkeypatch.setenv("TINKER_TELEMETRY", "0")
    networks: list[Lossy] = []

    def around(app: ASGIApp) -> ASGIApp:
        networks.append(Lossy(app))
        return networks[0]

    with training_server(tmp_path / "home", around) as (url, worker, _):
        yield url, networks[0], worker


def test_each_operation_is_done_once_and_in_its_order(lossy: tuple[str, Lossy, ScriptedWorker]) -> None:
    url, network, worker = lossy
    tensors = {"target_tokens": types.TensorData.from_torch(torch.arange(3))}
    datum = types.Datum(model_input=types.ModelInput.from_ints([1, 2, 3]), loss_fn_inputs=tensors)
    with tinker.ServiceClient(base_url=url, api_key="tml-test") as client:
        training = client.create_lora_training_client("tiny", rank=4).result()
        futures = []
        for step in range(NUM_STEPS):
            futures.append(training.forward_backward([datum], "cross_entropy"))
            futures.append(training.optim_step(types.AdamParams(learning_rate=step / 10)))
        assert all(future.result().metrics for future in futures)
        sampler = training.save_weights_and_get_sampling_client()
        sampler = getattr(sampler, "result", lambda: sampler)()
        samples = [
            sampler.sample(types.ModelInput.from_ints([1]), 1, types.SamplingParams(max_tokens=1)) for _ in range(6)
        ]
        assert all(sample.result().sequences for sample in samples)
        model_id = training.get_info().model_id
    assert network.num_lost > 3
    assert network.num_repeated > 3
    pair = ["forward_backward", "optim_step"]
    kinds = ["create_model", *pair * NUM_STEPS, "save_weights_for_sampler"]
    assert [(seq, kind) for lane, seq, kind in worker.done if lane == model_id] == list(enumerate(kinds))
    assert [step.learning_rate for step in worker.steps] == [step / 10 for step in range(NUM_STEPS)]
    assert len(worker.samples) == 6
