"""What becomes of a run whose processes die, by scripted ones; and what is made of several ranks' words."""

import asyncio
import os

import pytest

from smelt.cluster import launchers
from smelt.cluster.launchers import LAUNCHERS, Lives, LocalRanks
from smelt.cluster.ranks import verdict
from smelt.errors import ConfigError
from smelt.transport.messages import Failure, Result

DONE, OTHER = Result("f", 1, body=b"rank 0"), Result("f", 1, body=b"rank 1")
LOST = Result("f", 1, failure=Failure("LostRank", "another rank has ended"))
MISTAKE = Result("f", 1, failure=Failure("OutOfSpace", "no space left"))


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ([(DONE, False)], DONE),
        ([(DONE, False), (OTHER, False)], DONE),
        ([(None, False)], None),
        ([(LOST, False), (None, False)], None),  # a death, and who noticed it
        ([(LOST, False), (LOST, False)], None),  # a connection broke
        ([(LOST, False), (MISTAKE, False)], MISTAKE),
        ([(MISTAKE, False), (None, True)], MISTAKE),  # the other waited for it, and was killed for that
        ([(None, True), (OTHER, False)], None),
    ],
)
def test_several_ranks_words_are_one_result(answers: list[tuple[Result | None, bool]], expected: Result | None) -> None:
    assert verdict(answers) is expected


class Scripted:
    """Ranks whose life ends as it is told."""

    def __init__(self, ends_with: Result | None, *, waits: bool = False, cannot_start: bool = False) -> None:
        self.ends_with = ends_with
        self.cannot_start = cannot_start
        self.heard: list[str] = []
        self.has_begun = asyncio.Event()
        self.may_end = asyncio.Event()
        if not waits:
            self.may_end.set()

    async def start(self) -> None:
        if self.cannot_start:
            raise OSError("no more processes")

    async def result(self) -> Result | None:
        self.has_begun.set()
        await self.may_end.wait()
        return self.ends_with

    def interrupt(self) -> None:
        self.heard.append("interrupt")
        self.may_end.set()

    def kill(self) -> None:
        self.heard.append("kill")
        self.may_end.set()


@pytest.fixture(autouse=True)
def no_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launchers, "REST_SECONDS", 0.0)


async def outcome(lives: list[Scripted], checkpoints: list[str | None]) -> tuple[Result | None, int]:
    """The result, and how many lives were not needed; `checkpoints` are found one look after the other."""
    waiting, found = list(lives), iter(checkpoints)
    result = await Lives(lambda: waiting.pop(0), lambda: next(found)).result()
    return result, len(waiting)


pytestmark = pytest.mark.anyio


async def test_a_run_that_ends_is_not_begun_again() -> None:
    assert await outcome([Scripted(DONE), Scripted(None)], [None]) == (DONE, 1)


async def test_who_dies_is_replaced_as_long_as_there_are_new_checkpoints() -> None:
    lives = [*(Scripted(None) for _ in range(5)), Scripted(DONE)]
    looks = [None, "1", "1", "2", "2", "3", "3", "4", "4", "5", "5"]
    assert await outcome(lives, looks) == (DONE, 0)


async def test_who_only_dies_is_given_up() -> None:
    lives = [Scripted(None), Scripted(DONE, cannot_start=True), Scripted(None), Scripted(DONE)]
    assert await outcome(lives, ["1"] * 6) == (None, 1)


async def test_an_interruption_reaches_the_processes_and_lets_no_others_begin() -> None:
    first = Scripted(None, waits=True)
    lives = Lives(lambda: first, lambda: None, patience_s=None)
    waiting = asyncio.create_task(lives.result())
    await first.has_begun.wait()
    lives.interrupt()
    assert await waiting is None
    assert first.heard == ["interrupt"]


async def test_who_does_not_end_in_time_is_killed() -> None:
    stubborn = Scripted(None, waits=True)
    stubborn.interrupt = lambda: stubborn.heard.append("interrupt")  # type: ignore[method-assign]
    lives = Lives(lambda: stubborn, lambda: None, patience_s=0.01)
    waiting = asyncio.create_task(lives.result())
    await stubborn.has_begun.wait()
    lives.interrupt()
    await waiting
    assert stubborn.heard == ["interrupt", "kill"]


async def test_a_cancelled_wait_interrupts_the_run_and_waits_for_its_end() -> None:
    first = Scripted(DONE, waits=True)
    waiting = asyncio.create_task(Lives(lambda: first, lambda: None).result())
    await first.has_begun.wait()
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert first.heard == ["interrupt"]


def test_more_ranks_than_cores_are_refused() -> None:
    with pytest.raises(ConfigError, match="more than this machine's"):
        LocalRanks(lambda: DONE, (os.cpu_count() or 1) + 1)
    assert set(LAUNCHERS) == {"local", "ray"}
