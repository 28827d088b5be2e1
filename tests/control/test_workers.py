"""Live answers over real sockets, with workers that do as the test says."""

import asyncio
from pathlib import Path

import pytest

from dialling_in import ask, collect, hear, peer, text_of, waits_little, workers
from smelt.control import answers
from smelt.control.workers import Workers
from smelt.errors import (
    AlreadyExists,
    InvalidInput,
    NotFound,
    Overloaded,
    Unavailable,
    WorkerLost,
)
from smelt.storage.futures import Ledger
from smelt.storage.transitions import Submission
from smelt.transport.messages import (
    Cancel,
    Embed,
    Embedded,
    Failure,
    Finish,
    Generate,
    LoadModel,
    TextChunk,
    UnloadModel,
    WorkerStatus,
)
from smelt.types import TokenLogprob
from spine import letting_in

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(30)]

__all__ = ["waits_little", "workers"]


async def test_an_answer_arrives_piece_by_piece(workers: Workers, ledger: Ledger, socket_file: Path) -> None:
    async with letting_in(workers, ledger, socket_file), peer(workers, socket_file, models=("gpt",)) as worker:
        answer = workers.generate(ask())
        first = asyncio.ensure_future(anext(answer))
        assert await hear(worker, Generate) == ask()
        await worker.send(TextChunk("r", " or", (1,)))
        assert await first == TextChunk("r", " or", (1,))
        second = asyncio.ensure_future(anext(answer))
        await worker.send(TextChunk("r", " not", (2,)))
        assert await second == TextChunk("r", " not", (2,))
        await worker.send(Finish("r", "stop", 5, 2))
        assert await collect(answer) == [Finish("r", "stop", 5, 2)]
        [known] = workers.workers
        assert (known.name, known.device, known.models) == ("w", "cpu", ("gpt",))


async def test_what_a_reader_has_not_taken_comes_as_one_piece(
    workers: Workers, ledger: Ledger, socket_file: Path
) -> None:
    async with letting_in(workers, ledger, socket_file), peer(workers, socket_file) as worker:
        answer = workers.generate(ask())
        first = asyncio.ensure_future(anext(answer))
        await hear(worker, Generate)
        for text in "abcd":
            await worker.send(TextChunk("r", text, (ord(text),)))
        await worker.send(Finish("r", "length", 5, 4))
        pieces = [await first, *await collect(answer)]
        assert text_of(pieces) == "abcd"
        assert pieces[-1] == Finish("r", "length", 5, 4)


async def test_several_answers_come_each_with_its_end(workers: Workers, ledger: Ledger, socket_file: Path) -> None:
    async with letting_in(workers, ledger, socket_file), peer(workers, socket_file) as worker:
        answer = workers.generate(Generate("r", "ann", "gpt", "To be", num_samples=3, best_of=3))
        first = asyncio.ensure_future(anext(answer))
        await hear(worker, Generate)
        first_of_b = TextChunk("r", "b", (2,), 1, (TokenLogprob(2, b"b", -0.5),))
        second_of_b = TextChunk("r", "B", (3,), 1, (TokenLogprob(3, b"B", -1.5),))
        ends = [Finish("r", "stop", 5, 1, index=index) for index in range(3)]
        for message in (TextChunk("r", "a", (1,)), first_of_b, ends[2], second_of_b, ends[0], ends[1]):
            await worker.send(message)
        pieces = [await first, *await collect(answer)]
        both = TextChunk("r", "bB", (2, 3), 1, first_of_b.logprobs + second_of_b.logprobs)
        assert sorted(pieces, key=lambda piece: (piece.index, isinstance(piece, Finish))) in (
            [TextChunk("r", "a", (1,)), ends[0], both, ends[1], ends[2]],
            [TextChunk("r", "a", (1,)), ends[0], first_of_b, second_of_b, ends[1], ends[2]],
        )


async def test_a_failure_ends_all_answers_of_a_request(workers: Workers, ledger: Ledger, socket_file: Path) -> None:
    async with letting_in(workers, ledger, socket_file), peer(workers, socket_file) as worker:
        answer = workers.generate(Generate("r", "ann", "gpt", "To be", num_samples=3, best_of=3))
        first = asyncio.ensure_future(anext(answer))
        await hear(worker, Generate)
        await worker.send(Finish("r", "stop", 5, 1, index=1))
        failed = Finish("r", "aborted", 0, 0, Failure("InvalidInput", "no"))
        await worker.send(failed)
        assert [await first, *await collect(answer)] == [Finish("r", "stop", 5, 1, index=1), failed]


VECTORS = Embedded("e", b"\x00\x00\x80\x3f", 1)


async def test_vectors_come_with_their_count_or_their_failure(
    workers: Workers, ledger: Ledger, socket_file: Path
) -> None:
    request = Embed("e", "ann", "gpt", ("to be",))
    async with letting_in(workers, ledger, socket_file), peer(workers, socket_file) as worker:
        asking = asyncio.ensure_future(workers.embed(request))
        assert await hear(worker, Embed) == request
        await worker.send(VECTORS)
        await worker.send(Finish("e", "stop", 2, 0))
        assert await asking == (VECTORS, Finish("e", "stop", 2, 0))
        asking = asyncio.ensure_future(workers.embed(request))
        await hear(worker, Embed)
        await worker.send(Finish("e", "aborted", 0, 0, Failure("InvalidInput", "too long")))
        with pytest.raises(InvalidInput, match="too long"):
            await asking
        leaving = asyncio.ensure_future(workers.embed(request))
        await hear(worker, Embed)
        leaving.cancel()
        assert await hear(worker, Cancel) == Cancel("e")


async def test_a_model_is_loaded_by_one_worker_and_given_up_by_all(
    workers: Workers, ledger: Ledger, socket_file: Path
) -> None:
    async with (
        letting_in(workers, ledger, socket_file),
        peer(workers, socket_file, "a", models=("x", "y")) as a,
        peer(workers, socket_file, "b", models=("y",)) as b,
    ):
        loading = asyncio.ensure_future(workers.load_model("x"))
        request = await hear(a, LoadModel)
        assert request.model == "x"
        await a.send(Finish(request.request_id, "aborted", 0, 0, Failure("NotFound", "no x")))
        with pytest.raises(NotFound, match="no x"):
            await loading
        unloading = asyncio.ensure_future(workers.unload_model("y"))
        for worker in (a, b):
            await worker.send(Finish((await hear(worker, UnloadModel)).request_id, "stop", 0, 0))
        assert await unloading == 2
        assert await workers.unload_model("z") == 0
        unloading = asyncio.ensure_future(workers.unload_model("x"))
        await hear(a, UnloadModel)
        await a.close()
        assert await unloading == 1  # who is gone holds nothing


async def test_closing_the_generator_cancels_the_work(workers: Workers, ledger: Ledger, socket_file: Path) -> None:
    async with letting_in(workers, ledger, socket_file), peer(workers, socket_file) as worker:
        answer = workers.generate(ask())
        first = asyncio.ensure_future(anext(answer))
        await hear(worker, Generate)
        await worker.send(TextChunk("r", "a"))
        await first
        await answer.aclose()
        assert await hear(worker, Cancel) == Cancel("r")
        waiting = asyncio.ensure_future(anext(workers.generate(ask("r2"))))
        await hear(worker, Generate)
        waiting.cancel()
        assert await hear(worker, Cancel) == Cancel("r2")
        await worker.send(TextChunk("r", "late"))  # is passed over
        await worker.send(Finish("r", "aborted", 5, 2))
        other = asyncio.ensure_future(collect(workers.generate(ask("r3"))))
        await hear(worker, Generate)
        await worker.send(Finish("r3", "stop", 5, 0))
        assert await other == [Finish("r3", "stop", 5, 0)]


async def test_a_worker_that_dies_ends_its_answers_and_no_others(
    workers: Workers, ledger: Ledger, socket_file: Path
) -> None:
    async with letting_in(workers, ledger, socket_file), peer(workers, socket_file, "b", models=("b",)) as alive:
        async with peer(workers, socket_file, "a", models=("a",)) as dead:
            lost = workers.generate(ask("r1", "a"))
            kept = asyncio.ensure_future(collect(workers.generate(ask("r2", "b"))))
            first = asyncio.ensure_future(anext(lost))
            await hear(dead, Generate)
            await hear(alive, Generate)
            await dead.send(TextChunk("r1", "half"))
            assert text_of([await first]) == "half"
        with pytest.raises(WorkerLost, match="ask again"):
            await anext(lost)
        await alive.send(Finish("r2", "stop", 5, 0))
        assert await kept == [Finish("r2", "stop", 5, 0)]


async def test_without_a_worker_it_waits_for_one_but_not_for_ever(
    workers: Workers, ledger: Ledger, socket_file: Path
) -> None:
    with pytest.raises(Unavailable, match="no worker is connected") as caught:
        await collect(workers.generate(ask()))
    assert caught.value.retry_after_s == 5
    async with letting_in(workers, ledger, socket_file):
        early = asyncio.ensure_future(collect(workers.generate(ask())))
        async with peer(workers, socket_file) as worker:
            await hear(worker, Generate)
            await worker.send(Finish("r", "stop", 5, 0))
            assert await early == [Finish("r", "stop", 5, 0)]


async def test_a_request_goes_to_who_has_the_model_and_then_to_who_has_time(
    workers: Workers, ledger: Ledger, socket_file: Path
) -> None:
    async with (
        letting_in(workers, ledger, socket_file),
        peer(workers, socket_file, "a", models=("x",)) as a,
        peer(workers, socket_file, "b", models=("y",)) as b,
    ):
        tasks = []
        for name, model, goes_to in [("1", "y", b), ("2", "y", b), ("3", "z", a), ("4", "z", a), ("5", "x", a)]:
            tasks.append(asyncio.ensure_future(collect(workers.generate(ask(name, model)))))
            assert (await hear(goes_to, Generate)).request_id == name
        # The model that "a" was asked for is forgotten when nobody wants it any more.
        for name in "34":
            await a.send(Finish(name, "stop", 0, 0))
        await asyncio.gather(*tasks[2:4])
        tasks.append(asyncio.ensure_future(collect(workers.generate(ask("6", "w")))))
        assert (await hear(a, Generate)).request_id == "6"
        for worker in (a, b):
            await worker.close()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(result) for result in results] == [WorkerLost, WorkerLost, list, list, WorkerLost, WorkerLost]


async def test_a_worker_that_leaves_gets_nothing_new(workers: Workers, ledger: Ledger, socket_file: Path) -> None:
    async with letting_in(workers, ledger, socket_file), peer(workers, socket_file, "a", models=("gpt",)) as leaving:
        old = asyncio.ensure_future(collect(workers.generate(ask("old"))))
        await hear(leaving, Generate)
        await leaving.send(WorkerStatus("cpu", ("gpt",), leaving=True))
        await leaving.send(TextChunk("old", "a"))
        async with peer(workers, socket_file, "b") as other:
            new = asyncio.ensure_future(collect(workers.generate(ask("new"))))
            await hear(other, Generate)
            await leaving.send(Finish("old", "stop", 5, 1))
            assert text_of(await old) == "a"
            await other.send(Finish("new", "stop", 5, 0))
            await new


async def test_a_reader_that_is_too_slow_loses_its_answer_alone(
    workers: Workers, ledger: Ledger, socket_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "MAX_HELD_CHARS", 1000)
    async with letting_in(workers, ledger, socket_file), peer(workers, socket_file) as worker:
        slow, quick = workers.generate(ask("slow")), workers.generate(ask("quick"))
        first = asyncio.ensure_future(anext(slow))
        reading = asyncio.ensure_future(collect(quick))
        await hear(worker, Generate)
        await hear(worker, Generate)
        await worker.send(TextChunk("slow", "begin"))
        assert text_of([await first]) == "begin"
        for _ in range(12):
            await worker.send(TextChunk("slow", "x" * 100))
        assert await hear(worker, Cancel) == Cancel("slow")
        await worker.send(TextChunk("quick", "here"))
        await worker.send(Finish("quick", "stop", 1, 1))
        assert text_of(await reading) == "here"
        assert text_of([await anext(slow)]) == "x" * 1100
        with pytest.raises(Unavailable, match="more slowly than it is written"):
            await anext(slow)


async def test_too_many_that_wait_are_told_so(
    workers: Workers, ledger: Ledger, socket_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("smelt.control.workers.MAX_WAITING", 2)
    async with letting_in(workers, ledger, socket_file), peer(workers, socket_file) as worker:
        tasks = [asyncio.ensure_future(collect(workers.generate(ask(name)))) for name in "ab"]
        for _ in tasks:
            await hear(worker, Generate)
        with pytest.raises(Overloaded, match="2 requests wait"):
            await collect(workers.generate(ask("c")))
        with pytest.raises(AlreadyExists, match="'a' is being answered"):
            await collect(workers.generate(ask("a")))
        for name in "ab":
            await worker.send(Finish(name, "stop", 0, 0))
        await asyncio.gather(*tasks)
        third = asyncio.ensure_future(collect(workers.generate(ask("c"))))
        await hear(worker, Generate)
        third.cancel()


async def test_drain_waits_for_answers_and_takes_nothing_new(
    workers: Workers, ledger: Ledger, socket_file: Path
) -> None:
    async with letting_in(workers, ledger, socket_file), peer(workers, socket_file) as worker:
        answer = asyncio.ensure_future(collect(workers.generate(ask())))
        await hear(worker, Generate)
        drained = asyncio.ensure_future(workers.drain())
        await asyncio.sleep(0)
        with pytest.raises(Unavailable, match="going down"):
            await collect(workers.generate(ask("late")))
        accepted = await ledger.accept(Submission("ann", "generate", "f", b"", None, None))
        await worker.send(TextChunk("r", "end"))
        assert not drained.done()
        await worker.send(Finish("r", "stop", 5, 1))
        assert text_of(await answer) == "end"
        await drained
        assert (await ledger.read("ann", accepted)).state == "queued"
