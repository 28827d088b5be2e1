"""A whole worker behind a real socket: what clients of the API's side get from it, and what happens when ends go."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from smelt.cluster.worker import Shelf, Worker
from smelt.configs import DecoderConfig
from smelt.control.answers import check
from smelt.control.workers import Workers
from smelt.data.characters import ByteTokenizer
from smelt.errors import ConfigError, InvalidInput, NotFound, TransportError, Unavailable, WorkerLost
from smelt.inference.memory import MIB, Candidate, Upkeep
from smelt.inference.service import TextModel
from smelt.models.decoder import Decoder
from smelt.models.loading import write_model
from smelt.settings import Settings
from smelt.storage.futures import Future, Ledger
from smelt.storage.transitions import Submission
from smelt.transport.failures import error_of
from smelt.transport.messages import (
    Cancel,
    Completion,
    Embed,
    Failure,
    Finish,
    Generate,
    Grant,
    Lent,
    Ping,
    Pong,
    Render,
    Result,
    TextChunk,
    WorkerStatus,
)
from smelt.transport.streams import Connection, connect, listen
from smelt.transport.tinker_wire import decode_forward_backward
from smelt.types import ChatExample, ChatMessage, Conversation, SamplingParams, TokenLogprob
from spine import letting_in, until

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(60)]

CONFIG = DecoderConfig(vocab_size=257, block_size=64, n_layer=2, n_head=2, n_embd=16)
PARAMS = SamplingParams(max_tokens=30, temperature=1.0, seed=3)
SMALL = Candidate((), MIB)
ENDLESS = replace(PARAMS, max_tokens=10_000_000)


def make_decoder() -> Decoder:
    decoder = Decoder(CONFIG)
    decoder.initialize(0)
    return decoder


def load_tiny(name: str) -> TextModel:
    if name != "tiny":
        raise NotFound(f"no model {name!r}")
    model = TextModel(make_decoder(), ByteTokenizer())
    model.engine.vocab_size = 128  # characters of one byte, and no end of text
    return model


def expected(prompt: str, params: SamplingParams = PARAMS) -> str:
    text = load_tiny("tiny").generate(prompt, max_tokens=params.max_tokens, temperature=1.0, seed=params.seed)
    assert isinstance(text, str)
    return text


@pytest.fixture
def workers(ledger: Ledger) -> Workers:
    return Workers(ledger, patience_s=60)


@asynccontextmanager
async def working(address: Path, **options: Any) -> AsyncIterator[tuple[Worker, asyncio.Task[None]]]:
    """A worker of this process, and the task that runs it."""
    worker = Worker(address, load_tiny, "cpu", **options)
    running = asyncio.create_task(worker.run())
    yield worker, running
    if not running.done():
        worker.stop()
        worker.stop()
        await running


def ask(name: str, prompt: str = "Hello", model: str = "tiny", params: SamplingParams = PARAMS) -> Generate:
    return Generate(name, "ann", model, prompt, params=params)


async def collect(workers: Workers, request: Generate) -> tuple[str, int, Finish]:
    """(text, number of tokens that came with it, end)."""
    text, num_tokens, end = "", 0, None
    async for piece in workers.generate(request):
        if isinstance(piece, TextChunk):
            text += piece.text
            num_tokens += len(piece.token_ids)
        else:
            end = piece
    assert end is not None
    return text, num_tokens, end


async def submit(ledger: Ledger, request: Generate, kind: str = "generate") -> str:
    body = msgspec.msgpack.encode(request)
    return await ledger.accept(Submission("ann", kind, "f", body, None, None))


async def outcome(ledger: Ledger, future_id: str) -> Future:
    future = await ledger.wait("ann", future_id, 20)
    assert future.state in ("done", "failed", "cancelled")
    return future


async def test_live_answers_of_all_sorts(workers: Workers, ledger: Ledger, socket_file: Path) -> None:
    turns = (ChatMessage("user", "How are you?"),)
    async with letting_in(workers, ledger, socket_file), working(socket_file):
        answers = await asyncio.gather(
            collect(workers, ask("text", "To be")),
            collect(workers, Generate("ids", "ann", "tiny", (84, 111), params=PARAMS)),
            collect(workers, Generate("chat", "ann", "tiny", messages=turns, params=PARAMS)),
            collect(workers, ask("missing", model="gone")),
            collect(workers, ask("long", "x" * 99)),
        )
        texts = [text for text, _, _ in answers]
        chat = load_tiny("tiny").chat(turns, max_tokens=30, temperature=1.0, seed=3)
        assert texts == [expected("To be"), expected("To"), chat, "", ""]
        for _, num_tokens, end in answers[:3]:
            assert num_tokens == end.num_output_tokens <= 30
        assert answers[0][2] == Finish("text", "length", 5, 30)
        for (_, _, end), name in zip(answers[3:], ("NotFound", "InvalidInput"), strict=True):
            assert end.reason == "aborted"
            assert end.failure is not None
            assert end.failure.error == name
        [known] = workers.workers
        assert (known.device, known.models) == ("cpu", ("tiny",))
        await until(lambda: workers.workers[0].num_running + workers.workers[0].num_waiting == 0)


async def test_work_of_the_ledger(workers: Workers, ledger: Ledger, socket_file: Path) -> None:
    async with letting_in(workers, ledger, socket_file), working(socket_file):
        good = await submit(ledger, ask("g", "To be"))
        missing = await submit(ledger, ask("m", model="gone"))
        garbage = await ledger.accept(Submission("ann", "generate", "f", b"garbage", None, None))
        future = await outcome(ledger, good)
        [completion] = msgspec.msgpack.decode(future.result or b"", type=list[Completion])
        assert completion == Completion(expected("To be"), "length", 5, 30)
        failed = await outcome(ledger, missing)
        assert (failed.state, failed.category) == ("failed", "user")
        assert isinstance(error_of(msgspec.msgpack.decode(failed.result or b"", type=Failure)), NotFound)
        assert (await outcome(ledger, garbage)).category == "server"


async def test_several_answers_live_and_from_the_ledger(workers: Workers, ledger: Ledger, socket_file: Path) -> None:
    params = replace(PARAMS, max_tokens=6, num_logprobs=1)
    request = Generate("several", "ann", "tiny", "To be", params=params, num_samples=3, best_of=3)
    async with letting_in(workers, ledger, socket_file), working(socket_file):
        answers = [LiveText() for _ in range(3)]
        async for piece in workers.generate(request):
            answers[piece.index].take(piece)
        assert [answer.text for answer in answers] == [
            expected("To be", replace(PARAMS, max_tokens=6, seed=3 + index)) for index in range(3)
        ]
        future = await outcome(ledger, await submit(ledger, request))
        completions = msgspec.msgpack.decode(future.result or b"", type=list[Completion])
        for answer, completion in zip(answers, completions, strict=True):
            assert (completion.text, completion.reason) == (answer.text, answer.end.reason)
            assert (completion.num_prompt_tokens, completion.num_output_tokens) == (5, 6)
            assert [each.text for each in completion.logprobs] == [each.text for each in answer.logprobs]
            for told, again in zip(answer.logprobs, completion.logprobs, strict=True):
                assert told.logprob == pytest.approx(again.logprob, abs=1e-5)
                assert len(told.top) == len(again.top) == 1


class LiveText:
    """One of the answers to a request, as it comes."""

    def __init__(self) -> None:
        self.text = ""
        self.logprobs: list[TokenLogprob] = []
        self.end = Finish("", "aborted", 0, 0)

    def take(self, piece: TextChunk | Finish) -> None:
        if isinstance(piece, Finish):
            self.end = piece
        else:
            self.text += piece.text
            self.logprobs += piece.logprobs


async def test_texts_become_vectors(workers: Workers, ledger: Ledger, socket_file: Path) -> None:
    async with letting_in(workers, ledger, socket_file), working(socket_file):
        embedded, finish = await workers.embed(Embed("e", "ann", "tiny", ("To be", (84, 111))))
        assert (embedded.width, finish.num_prompt_tokens) == (CONFIG.n_embd, 7)
        expected_vectors = load_tiny("tiny").embed(["To be", "To"])
        np.testing.assert_allclose(np.frombuffer(embedded.vectors, "<f4").reshape(2, -1), expected_vectors, atol=1e-6)
        with pytest.raises(InvalidInput):
            await workers.embed(Embed("long", "ann", "tiny", ("x" * 99,)))
        with pytest.raises(NotFound):
            await workers.embed(Embed("gone", "ann", "gone", ("x",)))


async def test_conversations_become_data(workers: Workers, ledger: Ledger, socket_file: Path) -> None:
    talk = Conversation([ChatMessage("user", "1+1?"), ChatMessage("assistant", "2")])
    pair = ChatExample(talk, rejected=talk)
    async with letting_in(workers, ledger, socket_file), working(socket_file):
        rendered = await workers.render(Render("r", "ann", "tiny", (ChatExample(talk), pair)))
        one, two = decode_forward_backward(rendered.data).data
        assert bytes(one.tokens.tolist()) == b"User: 1+1?\n\nAssistant: 2"
        assert len(two.tokens) == 2 * len(one.tokens)
        wrong = Conversation([ChatMessage("user", "1+1?")])
        with pytest.raises(InvalidInput, match=r"data\[1\]: there is no turn of the role `assistant`"):
            await workers.render(Render("w", "ann", "tiny", (ChatExample(talk), ChatExample(wrong))))
        with pytest.raises(NotFound):
            await workers.render(Render("g", "ann", "gone", (ChatExample(talk),)))


async def test_models_come_and_go_as_they_are_told(workers: Workers, ledger: Ledger, socket_file: Path) -> None:
    async with letting_in(workers, ledger, socket_file), working(socket_file):
        await workers.load_model("tiny")
        await until(lambda: workers.workers[0].models == ("tiny",))
        [load] = workers.workers[0].model_loads
        assert (load.name, load.num_blocks_used) == ("tiny", 0)
        assert load.num_blocks > 0
        with pytest.raises(NotFound):
            await workers.load_model("gone")
        assert await workers.unload_model("tiny") == 1
        await until(lambda: workers.workers[0].models == ())


async def test_cancelled_work_stops_and_makes_room(workers: Workers, ledger: Ledger, socket_file: Path) -> None:
    async with letting_in(workers, ledger, socket_file), working(socket_file):
        work = await submit(ledger, ask("w", params=ENDLESS))
        await until(lambda: workers.workers != [] and workers.workers[0].num_running == 1)
        assert await workers.cancel("ann", work)
        await until(lambda: workers.workers[0].num_running == 0)
        answer = workers.generate(ask("live", params=ENDLESS))
        await anext(answer)
        await answer.aclose()
        await until(lambda: workers.workers[0].num_running == 0)


async def test_it_dials_again_and_keeps_its_models(workers: Workers, ledger: Ledger, socket_file: Path) -> None:
    num_loads = 0

    def load(name: str) -> TextModel:
        nonlocal num_loads
        num_loads += 1
        return load_tiny(name)

    worker = Worker(socket_file, load, "cpu")
    running = asyncio.create_task(worker.run())
    await asyncio.sleep(0.1)  # nobody is there yet
    work = await submit(ledger, ask("w", "To be", params=replace(PARAMS, max_tokens=400)))
    async with letting_in(workers, ledger, socket_file):
        lost = workers.generate(ask("lost", params=ENDLESS))
        await anext(lost)
        await until(lambda: work in workers._links[0].granted)
    with pytest.raises(WorkerLost):
        [piece async for piece in lost]
    assert (await ledger.read("ann", work)).state == "granted"
    # The API's process would begin anew here, and with it the ledger.
    reopened = Ledger(ledger._engine, ledger._writer, ledger._files)
    again = Workers(reopened)
    async with letting_in(again, reopened, socket_file):
        text, _, _ = await collect(again, ask("kept"))
        assert text == expected("Hello")
        future = await outcome(reopened, work)
        assert (future.state, future.attempts) == ("done", 0)
        [completion] = msgspec.msgpack.decode(future.result or b"", type=list[Completion])
        assert completion.text == expected("To be", replace(PARAMS, max_tokens=400))
        await until(lambda: again.workers[0].num_running == 0)
        assert num_loads == 1
    worker.stop()
    await running


async def test_told_to_end_it_finishes_what_runs_and_takes_nothing_new(
    workers: Workers, ledger: Ledger, socket_file: Path
) -> None:
    async with letting_in(workers, ledger, socket_file), working(socket_file) as (worker, running):
        params = replace(PARAMS, max_tokens=300)
        answer = workers.generate(ask("runs", params=params))
        text = (await anext(answer)).text  # type: ignore[union-attr]
        worker.stop()
        await until(lambda: not any(link.is_open for link in workers._links))
        later = asyncio.create_task(collect(workers, ask("later")))
        work = await submit(ledger, ask("w"))
        async for piece in answer:
            text += piece.text if isinstance(piece, TextChunk) else ""
        assert text == expected("Hello", params)
        await running
        assert not later.done()
        assert (await ledger.read("ann", work)).state == "queued"
        async with working(socket_file):
            assert (await later)[0] == expected("Hello")
            assert (await outcome(ledger, work)).attempts == 0


async def test_the_grace_period_ends(workers: Workers, ledger: Ledger, socket_file: Path) -> None:
    async with letting_in(workers, ledger, socket_file), working(socket_file, grace_s=0.1) as (worker, running):
        answer = workers.generate(ask("endless", params=ENDLESS))
        await anext(answer)
        worker.stop()
        await running
        with pytest.raises(WorkerLost):
            [piece async for piece in answer]


@asynccontextmanager
async def wire(address: Path, **options: Any) -> AsyncIterator[tuple[Connection, Worker]]:
    """The API's end of a worker's connection, bare."""
    arrived: asyncio.Queue[Connection] = asyncio.Queue()

    async def keep(connection: Connection) -> None:
        arrived.put_nowait(connection)
        await asyncio.Event().wait()

    async with listen(address, keep), working(address, **options) as (worker, _):
        connection = await arrived.get()
        assert isinstance(await connection.receive(), WorkerStatus)
        yield connection, worker


async def hear(connection: Connection, kind: type) -> Any:
    while not isinstance(message := await asyncio.wait_for(connection.receive(), 10), kind):
        pass
    return message


async def test_what_crosses_a_goodbye_is_refused_and_work_of_other_kinds_too(socket_file: Path) -> None:
    async with wire(socket_file) as (connection, worker):
        await connection.send(Grant("f", connection.epoch, "ann", None, None, "train"))
        assert "'train'" in (await hear(connection, Result)).failure.message
        await connection.send(ask("endless", params=ENDLESS))
        await hear(connection, TextChunk)
        worker.stop()
        while not (await hear(connection, WorkerStatus)).leaving:
            pass
        await connection.send(ask("late"))
        finish = await hear(connection, Finish)
        assert finish.request_id == "late"
        assert isinstance(error_of(finish.failure), Unavailable)
        await connection.send(Cancel("endless"))
        assert (await hear(connection, Finish)).reason == "aborted"
        with pytest.raises(TransportError):
            await hear(connection, Grant)


async def test_pings_are_answered_while_it_computes(socket_file: Path) -> None:
    async with wire(socket_file) as (connection, _):
        await connection.send(ask("endless", params=ENDLESS))
        for number in range(20):
            await connection.send(Ping(float(number)))
            assert await hear(connection, Pong) == Pong(float(number))


async def test_a_server_that_does_not_speak_to_workers_is_hung_up_on(socket_file: Path) -> None:
    async with wire(socket_file) as (connection, _):
        await connection.send(TextChunk("r", "?"))
        with pytest.raises(TransportError):
            await hear(connection, Grant)


async def test_a_bug_of_the_server_s_thread_ends_the_process(
    socket_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = Worker(socket_file, load_tiny, "cpu")
    monkeypatch.setattr(worker._server, "_report", lambda: 1 / 0)
    worker.preload("tiny")
    with pytest.raises(ZeroDivisionError):
        await worker.run()


async def test_off_this_machine_it_needs_tls_and_a_key() -> None:
    with pytest.raises(ConfigError, match="needs a key and a TLS certificate"):
        await Worker("192.0.2.1:80", load_tiny, "cpu").run()  # type: ignore[arg-type]


def test_only_registered_models_and_the_preloaded_one_are_loaded(tmp_path: Path, home: Path) -> None:
    settings = Settings(home=home)
    for folder in (settings.models / "listed", tmp_path / "private", tmp_path / "served"):
        write_model(CONFIG, make_decoder().state_dict(), folder)
        ByteTokenizer().save(folder)
    shelf = Shelf(settings, str(tmp_path / "served"))
    for name in ("listed", "served"):
        assert shelf.load(name).config == CONFIG
        assert shelf.examine(name).num_bytes > CONFIG.num_parameters
    for name in (str(tmp_path / "private"), "../../private", "hf:openai-community/gpt2", "gpt2"):
        for ask_for in (shelf.load, shelf.examine):
            with pytest.raises(NotFound, match="on this worker; registered: listed"):
                ask_for(name)


def test_a_model_written_anew_under_its_name_is_told_from_the_old_one(home: Path) -> None:
    settings = Settings(home=home)
    shelf = Shelf(settings, None)
    write_model(CONFIG, make_decoder().state_dict(), settings.models / "tiny")
    before = shelf.examine("tiny")
    assert shelf.examine("tiny").stamp == before.stamp
    write_model(CONFIG, make_decoder().state_dict(), settings.models / "tiny")
    assert shelf.examine("tiny").stamp != before.stamp


def test_what_the_settings_say_of_memory_is_what_models_get(home: Path) -> None:
    settings = Settings(home=home, kv_cache_mb=1, max_running=3, device="cpu", dtype="float32")
    write_model(CONFIG, make_decoder().state_dict(), settings.models / "tiny")
    predicted = Shelf(settings, None).examine("tiny").num_bytes
    assert 2**20 + 4 * CONFIG.num_parameters < predicted < 2**20 + 8 * CONFIG.num_parameters + 2**21
    assert settings.kv_cache_bytes == 2**20
    assert Settings(home=home, model_memory_mb=8).kv_cache_bytes == 2 * 2**20
    assert Settings(home=home).kv_cache_bytes is None


async def test_a_run_s_memory_is_lent_and_given_back(workers: Workers, ledger: Ledger, socket_file: Path) -> None:
    async with letting_in(workers, ledger, socket_file), working(socket_file, upkeep=Upkeep(examine=lambda _: SMALL)):
        await collect(workers, ask("before"))
        machine = workers.workers[0].name.rpartition(":")[0]
        async with await connect(socket_file, "launcher", f"{machine}:run") as launcher:
            await launcher.send(WorkerStatus("cpu", num_running=1, num_needed_bytes=2**60))
            while not isinstance(message := await launcher.receive(), Lent):
                assert isinstance(message, Ping)
            assert message.unloaded == ("tiny",)
            await until(lambda: [(w.models, w.num_lent_bytes) for w in workers.workers] == [((), 2**60)])
            with pytest.raises(Unavailable, match="are lent to a run until it ends"):
                check((await collect(workers, ask("meanwhile")))[2])
        await until(lambda: workers.workers[0].num_lent_bytes == 0)
        assert (await collect(workers, ask("after")))[0] == expected("Hello")
