"""Answers of several prompts as one stream; what of them is cancelled, and when."""

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from pathlib import Path

import pytest

from smelt.control import completions as module
from smelt.control.abuse_checker import AbuseChecker
from smelt.control.completions import Completions, gathered
from smelt.errors import InvalidInput, SeqReused, Unavailable
from smelt.settings import load_settings
from smelt.storage.database import open_database
from smelt.storage.futures import Ledger
from smelt.storage.writer import Writer
from smelt.transport.messages import Failure, Finish, Generate, TextChunk
from spine import until

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(30)]


class Writers:
    """A model server: each request writes what its prompt says, "!" is a failure, "." waits for ever."""

    def __init__(self) -> None:
        self.running: set[str] = set()

    async def generate(self, request: Generate) -> AsyncGenerator[TextChunk | Finish, None]:
        self.running.add(request.request_id)
        try:
            for letter in str(request.prompt):
                if letter == "!":
                    failure = Failure("InvalidInput", "no")
                    yield Finish(request.request_id, "aborted", 0, 0, failure)
                elif letter == ".":
                    await asyncio.Event().wait()
                elif letter == "-":
                    return
                else:
                    yield TextChunk(request.request_id, letter)
            yield Finish(request.request_id, "stop", 1, len(request.prompt))
        finally:
            self.running.discard(request.request_id)


@pytest.fixture
def writers() -> Writers:
    return Writers()


@pytest.fixture
def checker(tmp_path: Path, ledger: Ledger) -> Iterator[AbuseChecker]:
    settings = load_settings(home=tmp_path)
    engine = open_database(settings.database_url)
    writer = Writer(engine)
    yield AbuseChecker(settings, engine, writer)
    writer.close()
    engine.dispose()


@pytest.fixture
def completions(writers: Writers, ledger: Ledger, checker: AbuseChecker) -> Completions:
    return Completions(writers, ledger, checker)  # type: ignore[arg-type]


def ask(*prompts: str) -> list[Generate]:
    return [Generate(f"r{number}", "ann", "gpt", prompt=prompt) for number, prompt in enumerate(prompts)]


async def texts_of(completions: Completions, *prompts: str) -> dict[int, str]:
    texts: dict[int, str] = {}
    async with aclosing(completions.answers(ask(*prompts))) as pieces:
        async for number, piece in pieces:
            texts[number] = texts.get(number, "") + (piece.text if isinstance(piece, TextChunk) else "$")
    return texts


async def test_each_prompt_has_its_pieces_and_its_end(completions: Completions, writers: Writers) -> None:
    assert await texts_of(completions, "abc") == {0: "abc$"}
    assert await texts_of(completions, "abc", "", "d") == {0: "abc$", 1: "$", 2: "d$"}
    assert not writers.running


async def test_choices_are_numbered_by_prompt_and_then_by_sample(ledger: Ledger, checker: AbuseChecker) -> None:
    class Twice(Writers):
        async def generate(self, request: Generate) -> AsyncGenerator[TextChunk | Finish, None]:
            for index in reversed(range(request.num_samples)):
                yield TextChunk(request.request_id, f"{request.prompt}{index}", index=index)
                yield Finish(request.request_id, "stop", 1, 1, index=index)

    completions = Completions(Twice(), ledger, checker)  # type: ignore[arg-type]
    requests = [Generate(prompt, "ann", "gpt", prompt, num_samples=2, best_of=2) for prompt in "ab"]
    texts = [completion.text for completion in await gathered(completions.answers(requests), 4)]
    assert texts == ["a0", "a1", "b0", "b1"]
    requests[0] = Generate("a", "ann", "gpt", "a", num_samples=3, best_of=3)
    texts = [completion.text for completion in await gathered(completions.answers(requests[:1]), 3)]
    assert texts == ["a0", "a1", "a2"]


async def test_a_failure_is_raised_and_ends_the_others(completions: Completions, writers: Writers) -> None:
    for prompts in (("a!",), (".", "a!", ".")):
        with pytest.raises(InvalidInput, match="no"):
            await texts_of(completions, *prompts)
        assert not writers.running


async def test_an_answer_without_an_end_is_an_error(completions: Completions) -> None:
    for prompts in (("a-",), (".", "a-")):
        with pytest.raises(Unavailable, match="broke off"):
            await texts_of(completions, *prompts)


async def test_whoever_stops_reading_cancels_all(completions: Completions, writers: Writers) -> None:
    async with aclosing(completions.answers(ask("a.", "b."))) as pieces:
        seen = {(await anext(pieces))[0] for _ in range(2)}
        assert (seen, writers.running) == ({0, 1}, {"r0", "r1"})
    assert not writers.running


async def test_whoever_is_cancelled_cancels_all(completions: Completions, writers: Writers) -> None:
    reading = asyncio.create_task(texts_of(completions, ".", "."))
    await until(lambda: len(writers.running) == 2)
    reading.cancel()
    await asyncio.wait([reading])
    assert not writers.running


async def test_many_pieces_wait_for_their_reader(
    completions: Completions, writers: Writers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_WAITING_PIECES", 2)
    assert await texts_of(completions, "a" * 100, "b" * 100) == {0: "a" * 100 + "$", 1: "b" * 100 + "$"}


async def test_the_same_key_with_the_same_fingerprint_is_the_same_promise(completions: Completions) -> None:
    (request,) = ask("a")
    first = await completions.promise(request, "print", "key")
    assert await completions.promise(request, "print", "key") == first
    assert await completions.promise(request, "print") != first
    with pytest.raises(SeqReused):
        await completions.promise(request, "other", "key")
    for key in ("", "k" * 256, "new\nline"):
        with pytest.raises(InvalidInput, match="printable"):
            await completions.promise(request, "print", key)
