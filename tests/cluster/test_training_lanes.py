"""Sessions on a whole worker behind a real socket and ledger: order, sampling, states that come back bit for bit."""

import asyncio
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from lane_client import (
    FOLDER,
    LANE,
    PROMPT,
    Client,
    outcome,
    sample,
    serving,
    workers,
    working,
)
from session_worker import load_tiny
from smelt.cluster import lanes as lanes_module
from smelt.cluster import training_lanes
from smelt.control.models import new_model
from smelt.control.workers import Workers
from smelt.models import kernels
from smelt.models.loading import load_model
from smelt.storage.futures import Ledger
from smelt.storage.transitions import Submission
from smelt.transport import tinker_pb2 as pb
from smelt.transport.messages import Generate, TextChunk
from smelt.transport.operations import (
    SAMPLE,
    CreateModel,
    LoadWeights,
    MergeWeights,
    OptimStep,
    Sample,
    Sampler,
    SaveForSampler,
    UnloadSession,
)
from smelt.types import SamplingParams
from spine import until

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120)]

__all__ = ["workers"]


async def undisturbed(
    ledger: Ledger, socket_file: Path, home: Path, num_rounds: int, rank: int = 4
) -> list[bytes | None]:
    workers = Workers(ledger, patience_s=60)
    client = Client(ledger, "u:train:0")
    async with serving(workers, ledger, socket_file), working(socket_file, home):
        futures = [await client.open(rank)]
        for number in range(num_rounds):
            futures += await client.round(number)
        return await client.results(futures)


async def test_a_session_from_its_opening_to_its_end(
    workers: Workers, ledger: Ledger, socket_file: Path, tmp_path: Path
) -> None:
    client = Client(ledger)
    async with serving(workers, ledger, socket_file), working(socket_file, tmp_path):
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


async def test_an_adapter_becomes_a_model_and_once_only(
    workers: Workers, ledger: Ledger, socket_file: Path, tmp_path: Path
) -> None:
    client, models = Client(ledger), tmp_path / "models"
    async with serving(workers, ledger, socket_file), working(socket_file, tmp_path):
        await client.results([await client.open(), *await client.round(0)])
        whole = await client.submit("merge_weights", MergeWeights("whole", "models"))
        taken = await client.submit("merge_weights", MergeWeights("whole", "models"))
        with new_model("early", models, "a worker that died before it said so", f"{LANE}:{client.seq}"):
            pass
        early = await client.submit("merge_weights", MergeWeights("early", "models"))
        told = [json.loads(result or b"") for result in await client.results([whole, early])]
        assert told == [{"type": "merge_weights", "model": name} for name in ("whole", "early")]
        assert (await outcome(ledger, taken)).category == "user"
        await client.results(await client.round(1))
    merged, base = load_model(models / "whole")[0].state_dict(), load_tiny("tiny").model.state_dict()
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    assert "blocks.0.attention.out.weight" in changed
    assert "embedding.weight" not in changed


async def test_a_window_with_a_failure_never_steps(
    workers: Workers, ledger: Ledger, socket_file: Path, tmp_path: Path
) -> None:
    client = Client(ledger)
    async with serving(workers, ledger, socket_file), working(socket_file, tmp_path):
        await client.open()
        good, bad, step = await client.loss(1), await client.loss(2, loss="no_such"), await client.step()
        again = await client.round(3)
        assert (await outcome(ledger, good)).state == "done"
        assert (await outcome(ledger, bad)).category == "user"
        assert b"no_such" in ((await outcome(ledger, bad)).result or b"")
        assert (await outcome(ledger, step)).category == "server"
        results = await client.results(again)
    other = Client(ledger, "o:train:0")
    async with serving(workers, ledger, socket_file), working(socket_file, tmp_path):
        assert await other.results([await other.open(), *await other.round(3)]) == [
            json.dumps({"type": "create_model", "model_id": "o:train:0"}, separators=(",", ":")).encode(),
            *results,
        ]


@pytest.mark.parametrize("rank", [4, 0], ids=["adapter", "all weights"])
async def test_a_lane_comes_back_from_its_log_bit_for_bit(
    workers: Workers, ledger: Ledger, socket_file: Path, tmp_path: Path, rank: int
) -> None:
    expected = await undisturbed(ledger, socket_file, tmp_path / "other", 4, rank)
    client = Client(ledger)
    results: list[bytes | None] = []
    opened = [await client.open(rank)]
    for number in range(4):  # each time by another worker, and once within a window
        async with serving(workers, ledger, socket_file), working(socket_file, tmp_path):
            results += await client.results([*opened, *([await client.loss(number)])])
            opened = []
        async with serving(workers, ledger, socket_file), working(socket_file, tmp_path):
            results += await client.results([await client.loss(number + 100), await client.step()])
    assert results[1:] == expected[1:]


@pytest.mark.parametrize("rank", [4, 0], ids=["adapter", "all weights"])
async def test_it_comes_back_from_snapshots_and_the_log_behind_them_is_forgotten(
    workers: Workers, ledger: Ledger, socket_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    expected = await undisturbed(ledger, socket_file, tmp_path / "other", 6, rank)
    monkeypatch.setattr(lanes_module, "MAX_REPLAY_STEPS", 2)
    client = Client(ledger)
    results = await one_round_after_the_other(client, workers, socket_file, tmp_path, range(5), rank)
    snapshots = tmp_path / FOLDER / "snapshots"
    assert sorted(int(path.name) for path in snapshots.iterdir()) == [6, 12]
    logged = [entry.seq async for entry in ledger.log(LANE, 6, 99)]
    assert logged == list(range(7, 16))
    async with serving(workers, ledger, socket_file), working(socket_file, tmp_path):
        results += await client.results(await client.round(5))
    assert results[1:] == expected[1:]


async def one_round_after_the_other(
    client: Client, workers: Workers, socket_file: Path, home: Path, rounds: range, rank: int
) -> list[bytes | None]:
    results: list[bytes | None] = []
    async with serving(workers, client.ledger, socket_file), working(socket_file, home):
        results += await client.results([await client.open(rank)])
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
    async with serving(workers, ledger, socket_file), working(socket_file, tmp_path):
        futures = [[await client.open(), *await client.round(0), *await client.round(1)] for client in clients]
        for client, own in zip(clients, futures, strict=True):
            assert (await client.results(own))[1:] == expected[1:]


@pytest.mark.parametrize("rank", [4, 0], ids=["adapter", "all weights"])
async def test_samples_come_of_the_weights_as_they_were_saved(
    workers: Workers, ledger: Ledger, socket_file: Path, tmp_path: Path, rank: int
) -> None:
    client = Client(ledger)
    kept = SaveForSampler(f"{FOLDER}/ephemeral/s_sample_0", "s:sample:0")
    sampler = Sampler("s:sample:0", "tiny", kept.folder, LANE, 4)
    base = Sampler("s:sample:1", "tiny")
    async with serving(workers, ledger, socket_file), working(socket_file, tmp_path):
        await client.results([await client.open(rank), *await client.round(0)])
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
    async with serving(workers, ledger, socket_file), working(socket_file, tmp_path):
        later = await sample(ledger, sampler, num_prompt_logprobs=2, num_logprobs=3)
        assert later.sequences == first.sequences
    await client.submit("optim_step", OptimStep())
    shutil.rmtree(tmp_path / kept.folder)  # as if the power had taken it
    async with serving(workers, ledger, socket_file), working(socket_file, tmp_path):
        made_again = await sample(ledger, sampler, num_prompt_logprobs=2, num_logprobs=3)
        await client.results(await client.round(2))
    assert made_again.sequences == first.sequences
    assert (tmp_path / kept.folder / ("adapter_config.json" if rank else "model.safetensors")).is_file()


async def test_a_sampler_that_cannot_be_made_again_is_no_reason_for_others(
    workers: Workers, ledger: Ledger, socket_file: Path, tmp_path: Path
) -> None:
    client = Client(ledger)
    async with serving(workers, ledger, socket_file), working(socket_file, tmp_path):
        await client.results([await client.open(), *await client.round(0)])
        await ledger.forget_log(LANE, 2)
        lost = Sampler("s:sample:0", "tiny", "sessions/none", LANE, 3)
        body = msgspec.msgpack.encode(Sample(lost, PROMPT, SamplingParams()))
        future = await outcome(ledger, await ledger.accept(Submission("ann", SAMPLE, "f", body, None, None)))
        assert future.category == "server"


async def test_the_model_may_be_unloaded_between_operations(
    workers: Workers, ledger: Ledger, socket_file: Path, tmp_path: Path
) -> None:
    expected = await undisturbed(ledger, socket_file, tmp_path / "other", 2)
    client = Client(ledger)
    async with serving(workers, ledger, socket_file), working(socket_file, tmp_path):
        results = await client.results([await client.open(), *await client.round(0)])
        assert await workers.unload_model("tiny") == 1
        results += await client.results(await client.round(1))
    assert results[1:] == expected[1:]


async def test_idle_sessions_leave_for_the_disk_where_memory_is_short_but_for_the_newest(
    workers: Workers, ledger: Ledger, socket_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = await undisturbed(ledger, socket_file, tmp_path / "other", 2)
    monkeypatch.setattr(training_lanes, "MAX_HELD_BYTES", 1)
    client = Client(ledger)
    async with serving(workers, ledger, socket_file), working(socket_file, tmp_path) as worker:
        results = await client.results([await client.open(), *await client.round(0)])
        newest = Client(ledger, "n:train:0")
        await newest.results([await newest.open()])
        assert worker._lanes is not None
        await until(lambda: list(worker._lanes._lanes) == ["n:train:0"])
        results += await client.results(await client.round(1))
    assert results[1:] == expected[1:]


async def test_a_session_on_no_model_fails_and_so_does_what_follows(
    workers: Workers, ledger: Ledger, socket_file: Path, tmp_path: Path
) -> None:
    client = Client(ledger)
    async with serving(workers, ledger, socket_file), working(socket_file, tmp_path):
        opened = await client.submit("create_model", CreateModel("gone", 4, 0))
        loss, step = await client.loss(0), await client.step()
        assert [(await outcome(ledger, each)).category for each in (opened, loss, step)] == ["user"] * 3


async def test_results_that_were_lost_on_their_way_come_again(
    workers: Workers, ledger: Ledger, socket_file: Path, tmp_path: Path
) -> None:
    expected = await undisturbed(ledger, socket_file, tmp_path / "other", 6)
    client = Client(ledger)
    futures = [await client.open()]
    for number in range(6):
        futures += await client.round(number)
    async with working(socket_file, tmp_path):
        for last in (3, 9, len(futures) - 1):
            reopened = Ledger(ledger._engine, ledger._writer, ledger._files)  # as after a restart of the server
            async with serving(Workers(reopened), reopened, socket_file):
                await outcome(reopened, futures[last])
    client.ledger = reopened
    assert (await client.results(futures))[1:] == expected[1:]


async def test_what_is_sampled_is_as_likely_as_the_trainer_finds_it(
    workers: Workers, ledger: Ledger, socket_file: Path, tmp_path: Path
) -> None:
    client = Client(ledger)
    kept = SaveForSampler(f"{FOLDER}/sampler_weights/a", "s:sample:0", "tinker://a")
    async with serving(workers, ledger, socket_file), working(socket_file, tmp_path):
        futures = [await client.open(), *await client.round(0)]
        futures += [await client.submit("save_weights_for_sampler", kept), await client.loss(7, num_data=1)]
        results = await client.results(futures)
        assert json.loads(results[-2] or b"")["path"] == "tinker://a"
        ids = tuple(np.random.default_rng(7).integers(0, 128, 13).tolist())
        targets = tuple(number for token in ids[1:] for number in (token, -1))
        request = Sample(
            Sampler("s:sample:9", "tiny", kept.folder), ids, SamplingParams(max_tokens=1, num_prompt_logprobs=0),
            last_prompt_logprobs=4, target_ids=targets, num_targets=2, num_alternatives=3,
        )  # fmt: skip
        body = msgspec.msgpack.encode(request)
        future = await outcome(ledger, await ledger.accept(Submission("ann", SAMPLE, "f", body, None, None)))
    found = pb.SampleResponse()
    found.ParseFromString(future.result or b"")
    answer = pb.ForwardBackwardOutput()
    answer.ParseFromString(results[-1] or b"")
    trained = np.frombuffer(answer.loss_fn_outputs[0].fields["logprobs"].data, "<f4")
    prompt = np.frombuffer(found.prompt_logprobs, "<f4")
    assert np.isnan(prompt[:9]).all()
    np.testing.assert_allclose(prompt[9:], trained[8:], atol=1e-5)
    scored = np.frombuffer(found.target_prompt_logprobs.dense, "<f4").reshape(12, 2)
    np.testing.assert_allclose(scored[:, 0], trained, atol=1e-5)
    assert (scored[:, 1] == 0).all()
    assert list(found.prompt_alt_tokens.tokens.shape) == [12, 3]
    assert len(np.frombuffer(found.sequences[0].tokens, "<i4")) == 1


async def test_answers_are_written_with_what_a_session_has_saved(
    workers: Workers, ledger: Ledger, socket_file: Path, tmp_path: Path
) -> None:
    client = Client(ledger)
    params = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    folder = f"{FOLDER}/sampler_weights/a"

    async def tokens(name: str, adapter: str | None) -> list[int]:
        request = Generate(name, "ann", "tiny", PROMPT, params=params, adapter=adapter)
        pieces = [piece async for piece in workers.generate(request)]
        return [token for piece in pieces if isinstance(piece, TextChunk) for token in piece.token_ids]

    async with serving(workers, ledger, socket_file), working(socket_file, tmp_path):
        futures = [await client.open()]
        for number in range(4):
            futures += await client.round(number)
        futures += [await client.submit("save_weights_for_sampler", SaveForSampler(folder, "s", "tinker://a"))]
        await client.results(futures)
        assert await tokens("with", folder) != await tokens("without", None)
        assert await tokens("again", folder) == await tokens("and again", folder)
        drawn = await sample(ledger, Sampler("s:sample:7", "tiny", folder), max_tokens=12, temperature=0.0, seed=1)
        assert np.frombuffer(drawn.sequences[0].tokens, "<i4").tolist() == await tokens("more", folder)


async def test_answers_are_written_while_it_trains(
    workers: Workers, ledger: Ledger, socket_file: Path, tmp_path: Path
) -> None:
    client = Client(ledger)
    params = SamplingParams(max_tokens=400, temperature=1.0, seed=3, ignore_eos=True)
    async with serving(workers, ledger, socket_file), working(socket_file, tmp_path):
        await client.results([await client.open()])
        large = await client.loss(5, num_data=600)
        alone = asyncio.create_task(client.results([large]))
        num_pieces = 0
        async for _ in workers.generate(Generate("g", "ann", "tiny", PROMPT, params=params)):
            num_pieces += not alone.done()
        cut = (await alone)[0]
    assert num_pieces > 3
    other = Client(ledger, "o:train:0")
    async with serving(workers, ledger, socket_file), working(socket_file, tmp_path):
        whole = (await other.results([await other.open(), await other.loss(5, num_data=600)]))[1]
    assert cut == whole


@contextmanager
def process(address: Path, home: Path, max_replay_steps: int) -> Iterator[None]:
    """A worker that is killed at the block's end, if not before."""
    script = Path(__file__).parents[1] / "session_worker.py"
    worker = subprocess.Popen([sys.executable, str(script), str(address), str(home), str(max_replay_steps)])
    try:
        yield
    finally:
        worker.kill()
        worker.wait()


@pytest.mark.slow
async def test_killed_at_any_moment_it_comes_to_the_same_results(
    workers: Workers, ledger: Ledger, socket_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As in the processes that are killed, nobody has started a build, which another test may have done here.
    monkeypatch.setattr(kernels, "_BUILD", kernels._Build())
    num_rounds, num_lanes = 8, 3
    expected = await undisturbed(ledger, socket_file, tmp_path / "other", num_rounds)
    clients = [Client(ledger, f"k{number}:train:0") for number in range(num_lanes)]
    futures = [[await client.open()] for client in clients]
    for number in range(num_rounds):
        for client, own in zip(clients, futures, strict=True):
            own += await client.round(number)
    async with serving(workers, ledger, socket_file):
        for lane, seq in ((0, 2), (1, 7), (2, 13), (0, 20)):
            with process(socket_file, tmp_path, 1 if seq % 2 else 3):
                await outcome(ledger, futures[lane][seq])
            await until(lambda: not workers.workers)
        with process(socket_file, tmp_path, 2):
            for client, own in zip(clients, futures, strict=True):
                assert (await client.results(own))[1:] == expected[1:]
    found = [await ledger.read("ann", future) for own in futures for future in own]
    assert any(future.attempts for future in found)
