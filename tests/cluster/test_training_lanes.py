"""Sessions on a whole worker behind a real socket and ledger: order, sampling, states that come back bit for bit."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from smelt.cluster import lanes as lanes_module
from smelt.cluster.worker import Worker
from smelt.configs import DecoderConfig
from smelt.control.workers import Workers
from smelt.data.characters import ByteTokenizer
from smelt.errors import NotFound
from smelt.inference.service import TextModel
from smelt.models.decoder import Decoder
from smelt.storage.futures import Future, Ledger
from smelt.storage.transitions import Submission
from smelt.transport import tinker_pb2 as pb
from smelt.transport.operations import (
    SAMPLE,
    CreateModel,
    LoadWeights,
    OptimStep,
    Sample,
    Sampler,
    SaveForSampler,
    SaveWeights,
    UnloadSession,
)
from smelt.types import SamplingParams
from spine import letting_in, until

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120)]

CONFIG = DecoderConfig(vocab_size=128, block_size=64, n_layer=2, n_head=2, n_embd=16)
LANE = "s:train:0"
FOLDER = "sessions/s_train_0"
PROMPT = tuple(range(40, 50))


def load_tiny(name: str) -> TextModel:
    if name != "tiny":
        raise NotFound(f"no model {name!r}")
    decoder = Decoder(CONFIG)
    decoder.initialize(0)
    return TextModel(decoder, ByteTokenizer())


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
async def working(address: Path, home: Path) -> AsyncIterator[Worker]:
    worker = Worker(address, load_tiny, "cpu", grace_s=0.1)
    worker.keep_sessions(home)
    running = asyncio.create_task(worker.run())
    try:
        yield worker
    finally:
        worker.stop()
        worker.stop()
        await running


async def undisturbed(ledger: Ledger, socket_file: Path, home: Path, num_rounds: int) -> list[bytes | None]:
    workers = Workers(ledger, patience_s=60)
    client = Client(ledger, "u:train:0")
    async with letting_in(workers, ledger, socket_file), working(socket_file, home):
        futures = [await client.open()]
        for number in range(num_rounds):
            futures += await client.round(number)
        return await client.results(futures)


async def test_a_session_from_its_opening_to_its_end(
    workers: Workers, ledger: Ledger, socket_file: Path, tmp_path: Path
) -> None:
    client = Client(ledger)
    async with letting_in(workers, ledger, socket_file), working(socket_file, tmp_path):
        futures = [await client.open(), *await client.round(0), await client.save("a")]
        futures += [await client.submit("load_weights", LoadWeights(f"{FOLDER}/weights/a", "p", True, "tiny"))]
        futures += [await client.submit("unload_model", UnloadSession())]
        opened, loss, _, stepped, saved, loaded, ended = await client.results(futures)
        assert json.loads(opened or b"") == {"type": "create_model", "model_id": LANE}
        answer = pb.ForwardBackwardOutput()
        answer.ParseFromString(loss or b"")
        assert answer.metrics["loss:sum"] > 0
        assert answer.loss_fn_outputs[0].num_datums == 2
        assert json.loads(stepped or b"")["metrics"]["grad_norm"] > 0
        assert json.loads(saved or b"") == {"type": "save_weights", "path": "tinker://a"}
        assert json.loads(loaded or b"") == {"type": "load_weights", "path": "p", "model_id": LANE}
        assert json.loads(ended or b"") == {"type": "unload_model", "model_id": LANE}
        assert (tmp_path / FOLDER / "weights/a/adapter_model.safetensors").is_file()
        assert await workers.unload_model("tiny") == 1


async def test_a_window_with_a_failure_never_steps(
    workers: Workers, ledger: Ledger, socket_file: Path, tmp_path: Path
) -> None:
    client = Client(ledger)
    async with letting_in(workers, ledger, socket_file), working(socket_file, tmp_path):
        await client.open()
        good, bad, step = await client.loss(1), await client.loss(2, loss="no_such"), await client.step()
        again = await client.round(3)
        assert (await outcome(ledger, good)).state == "done"
        assert (await outcome(ledger, bad)).category == "user"
        assert (await outcome(ledger, step)).category == "server"
        results = await client.results(again)
    other = Client(ledger, "o:train:0")
    async with letting_in(workers, ledger, socket_file), working(socket_file, tmp_path):
        assert await other.results([await other.open(), *await other.round(3)]) == [
            json.dumps({"type": "create_model", "model_id": "o:train:0"}, separators=(",", ":")).encode(),
            *results,
        ]


async def test_a_lane_comes_back_from_its_log_bit_for_bit(
    workers: Workers, ledger: Ledger, socket_file: Path, tmp_path: Path
) -> None:
    expected = await undisturbed(ledger, socket_file, tmp_path / "other", 4)
    client = Client(ledger)
    results: list[bytes | None] = []
    opened = [await client.open()]
    for number in range(4):  # each time by another worker, and once within a window
        async with letting_in(workers, ledger, socket_file), working(socket_file, tmp_path):
            results += await client.results([*opened, *([await client.loss(number)])])
            opened = []
        async with letting_in(workers, ledger, socket_file), working(socket_file, tmp_path):
            results += await client.results([await client.loss(number + 100), await client.step()])
    assert results[1:] == expected[1:]


async def test_it_comes_back_from_snapshots_and_the_log_behind_them_is_forgotten(
    workers: Workers, ledger: Ledger, socket_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = await undisturbed(ledger, socket_file, tmp_path / "other", 6)
    monkeypatch.setattr(lanes_module, "MAX_REPLAY_STEPS", 2)
    client = Client(ledger)
    results = await one_round_after_the_other(client, workers, socket_file, tmp_path, range(5))
    snapshots = tmp_path / FOLDER / "snapshots"
    assert sorted(int(path.name) for path in snapshots.iterdir()) == [6, 12]
    logged = [entry.seq async for entry in ledger.log(LANE, 6, 99)]
    assert logged == list(range(7, 16))
    async with letting_in(workers, ledger, socket_file), working(socket_file, tmp_path):
        results += await client.results(await client.round(5))
    assert results[1:] == expected[1:]


async def one_round_after_the_other(
    client: Client, workers: Workers, socket_file: Path, home: Path, rounds: range
) -> list[bytes | None]:
    results: list[bytes | None] = []
    async with letting_in(workers, client.ledger, socket_file), working(socket_file, home):
        results += await client.results([await client.open()])
        for number in rounds:
            results += await client.results(await client.round(number))
        folder = home / FOLDER / "snapshots"
        await until(lambda: {"6", "12"} == {path.name for path in folder.iterdir()})
    return results


async def test_many_lanes_share_passes_and_none_of_them_notices(
    workers: Workers, ledger: Ledger, socket_file: Path, tmp_path: Path
) -> None:
    expected = await undisturbed(ledger, socket_file, tmp_path / "other", 2)
    clients = [Client(ledger, f"m{number}:train:0") for number in range(8)]
    async with letting_in(workers, ledger, socket_file), working(socket_file, tmp_path):
        futures = [[await client.open(), *await client.round(0), *await client.round(1)] for client in clients]
        for client, own in zip(clients, futures, strict=True):
            assert (await client.results(own))[1:] == expected[1:]


async def test_samples_come_of_the_weights_as_they_were_saved(
    workers: Workers, ledger: Ledger, socket_file: Path, tmp_path: Path
) -> None:
    client = Client(ledger)
    kept = SaveForSampler(f"{FOLDER}/ephemeral/s_sample_0", "s:sample:0")
    sampler = Sampler("s:sample:0", "tiny", kept.folder, LANE, 4)
    base = Sampler("s:sample:1", "tiny")
    async with letting_in(workers, ledger, socket_file), working(socket_file, tmp_path):
        await client.results([await client.open(), *await client.round(0)])
        [saved] = await client.results([await client.submit("save_weights_for_sampler", kept)])
        assert json.loads(saved or b"")["sampling_session_id"] == "s:sample:0"
        first = await sample(ledger, sampler, num_prompt_logprobs=2, num_logprobs=3)
        plain = await sample(ledger, base, num_prompt_logprobs=2)
        await client.results(await client.round(1))  # training goes on
        again = await sample(ledger, sampler, num_prompt_logprobs=2, num_logprobs=3)
    assert first.sequences == again.sequences
    assert np.frombuffer(first.sequences[0].tokens, "<i4").shape == (5,)
    assert first.sequences[0].topk_sampled_logprobs.k == 3
    logprobs, plainly = (np.frombuffer(each.prompt_logprobs, "<f4") for each in (first, plain))
    assert np.isnan(logprobs[0])
    assert len(logprobs) == len(PROMPT)
    assert np.abs(logprobs[1:] - plainly[1:]).max() > 1e-3
    async with letting_in(workers, ledger, socket_file), working(socket_file, tmp_path):
        later = await sample(ledger, sampler, num_prompt_logprobs=2, num_logprobs=3)
    assert later.sequences == first.sequences


async def test_the_model_may_be_unloaded_between_operations(
    workers: Workers, ledger: Ledger, socket_file: Path, tmp_path: Path
) -> None:
    expected = await undisturbed(ledger, socket_file, tmp_path / "other", 2)
    client = Client(ledger)
    async with letting_in(workers, ledger, socket_file), working(socket_file, tmp_path):
        results = await client.results([await client.open(), *await client.round(0)])
        assert await workers.unload_model("tiny") == 1
        results += await client.results(await client.round(1))
    assert results[1:] == expected[1:]


async def test_a_session_on_no_model_fails_and_so_does_what_follows(
    workers: Workers, ledger: Ledger, socket_file: Path, tmp_path: Path
) -> None:
    client = Client(ledger)
    async with letting_in(workers, ledger, socket_file), working(socket_file, tmp_path):
        opened = await client.submit("create_model", CreateModel("gone", 4, 0))
        loss, step = await client.loss(0), await client.step()
        assert [(await outcome(ledger, each)).category for each in (opened, loss, step)] == ["user"] * 3
