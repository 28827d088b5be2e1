"""A worker of the ledger that does training operations and samples without a model, and a live server around it."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import numpy as np
from starlette.types import ASGIApp, Receive, Scope, Send

import live
from leftovers import collected
from scripted import scripted
from smelt.api.app import create_app
from smelt.api.services import Services
from smelt.errors import SmeltError
from smelt.storage.futures import Granted, Ledger
from smelt.transport.failures import failure_of, is_of_the_user
from smelt.transport.operations import (
    SAMPLE,
    TRAINING_KINDS,
    LoadWeights,
    MergeWeights,
    OptimStep,
    Sample,
    SaveForSampler,
    SaveWeights,
)
from smelt.transport.tinker_wire import (
    Sampled,
    decode_forward_backward,
    encode_outputs,
    encode_samples,
    padded_top,
)

KINDS = (*TRAINING_KINDS, SAMPLE)
MAX_GRANTED = 64
TOKEN = 7  # what is sampled, again and again
LOGPROB = -0.5
FILES = ("adapter_config.json", "adapter_model.safetensors")

Hook = Callable[[Granted], None]


class ScriptedWorker:
    """Does what it is granted in its order, all log-probabilities being LOGPROB, and remembers what that was.

    `before` may raise for a row, which then fails with that error. While `gate` is not set, nothing is done.
    """

    def __init__(self, ledger: Ledger, home: Path, before: Hook = lambda _row: None) -> None:
        self._ledger = ledger
        self._home = home
        self.before = before
        self.done: list[tuple[str | None, int | None, str]] = []
        self.samples: list[Sample] = []
        self.steps: list[OptimStep] = []
        self.loads: list[LoadWeights] = []
        self.gate = asyncio.Event()
        self.gate.set()

    async def run(self) -> None:
        epoch = await self._ledger.open_epoch()
        while True:
            rows = await self._ledger.next_grants(epoch, MAX_GRANTED, KINDS)
            for row in rows:
                await self.gate.wait()
                await self._finish(row, epoch)

    async def _finish(self, row: Granted, epoch: int) -> None:
        try:
            self.before(row)
            result, category = self._result(row), None
        except SmeltError as error:
            failure = failure_of(error)
            result, category = msgspec.msgpack.encode(failure), "user" if is_of_the_user(failure) else "server"
        self.done.append((row.lane, row.seq, row.kind))
        await self._ledger.finish(row.id, epoch, result, category, durable=row.kind == SAMPLE)

    def _result(self, row: Granted) -> bytes:
        body, lane = row.request or b"", row.lane or ""
        match row.kind:
            case "forward_backward":
                return self._forward_backward(body)
            case "sample":
                return self._sample(body)
            case "optim_step":
                self.steps.append(msgspec.msgpack.decode(body, type=OptimStep))
                answer: dict[str, object] = {"metrics": {"grad_norm": 1.0, "lr": self.steps[-1].learning_rate}}
            case "save_weights":
                save = msgspec.msgpack.decode(body, type=SaveWeights)
                self._write(save.folder)
                answer = {"path": save.path}
            case "save_weights_for_sampler" | "save_weights_external":
                sampler = msgspec.msgpack.decode(body, type=SaveForSampler)
                self._write(sampler.folder)
                answer = {"path": sampler.path} if sampler.path else {"sampling_session_id": sampler.sampler_id}
            case "merge_weights":
                answer = {"model": msgspec.msgpack.decode(body, type=MergeWeights).name}
            case "load_weights":
                self.loads.append(msgspec.msgpack.decode(body, type=LoadWeights))
                answer = {"path": self.loads[-1].path, "model_id": lane}
            case _:
                answer = {"model_id": lane}
        return msgspec.json.encode({"type": row.kind, **answer})

    def _forward_backward(self, body: bytes) -> bytes:
        request = decode_forward_backward(body)
        logprobs = [np.full(datum.inputs["target_tokens"].shape, LOGPROB, np.float32) for datum in request.data]
        return encode_outputs(logprobs, {"loss:sum": float(-sum(each.sum() for each in logprobs))})

    def _sample(self, body: bytes) -> bytes:
        request = msgspec.msgpack.decode(body, type=Sample)
        self.samples.append(request)
        num_prompt, num_new = len(request.prompt_ids), request.params.max_tokens
        drawn = Sampled([TOKEN] * num_new, [LOGPROB] * num_new, has_stopped=False)
        scores, top = None, None
        if request.params.num_prompt_logprobs is not None:
            scores = np.full(num_prompt, LOGPROB, np.float32)
            scores[: num_prompt - (request.last_prompt_logprobs or num_prompt - 1)] = np.nan
            if k := request.params.num_prompt_logprobs:
                top = padded_top([[], *[[(TOKEN, LOGPROB)]] * (num_prompt - 1)], k)
        targets = None
        if request.num_targets:
            asked = np.array(request.target_ids).reshape(-1, request.num_targets)
            targets = np.where(asked < 0, 0.0, LOGPROB).astype(np.float32)
        k = request.num_alternatives
        alternatives = padded_top([[(TOKEN, LOGPROB)] * k] * (num_prompt - 1), k) if k else None
        return encode_samples(
            [drawn] * request.num_samples,
            prompt_logprobs=scores,
            prompt_top=top,
            target_prompt_logprobs=targets,
            alternatives=alternatives,
        )

    def _write(self, folder: str) -> None:
        path = self._home / folder
        path.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            (path / name).write_text(f"{name} of {folder}")


def with_worker(app: ASGIApp, worker: ScriptedWorker) -> ASGIApp:
    """The application, beside which the worker runs from the first request on."""
    tasks: list[asyncio.Task[None]] = []

    async def call(scope: Scope, receive: Receive, send: Send) -> None:
        if not tasks:
            tasks.append(asyncio.create_task(worker.run()))
        await app(scope, receive, send)

    return call


@contextmanager
def training_server(
    home: Path, around: Callable[[ASGIApp], ASGIApp] = lambda app: app
) -> Iterator[tuple[str, ScriptedWorker, Services]]:
    """(address, worker, services) of a server with the model `tiny`; `around` may wrap the application."""
    with collected(), scripted(home) as (services, _):
        worker = ScriptedWorker(services.ledger, home)
        with live.serving(with_worker(around(create_app(services)), worker)) as url:
            yield url, worker, services
