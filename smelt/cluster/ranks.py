"""Ranks: the processes that train one model together, for one life, and what they said as one result; starts none."""

from collections.abc import Callable
from typing import Protocol

from smelt.errors import LostRank
from smelt.transport.messages import Failure, Result

Work = Callable[[], Result]  # what each rank does; picklable


class Ranks(Protocol):
    """One life of the processes that train together."""

    async def start(self) -> None:
        """Returns when they have been started; OSError or EOFError where they cannot be."""
        ...

    async def result(self) -> Result | None:
        """What came of it, once all have ended; None where one died without a word, or lost another."""
        ...

    def interrupt(self) -> None:
        """Ask all to save and end, without waiting."""
        ...

    def kill(self) -> None:
        """End all at once."""
        ...


def verdict(answers: list[tuple[Result | None, bool]]) -> Result | None:
    """What ranks said, each with whether it was killed for being late, as one result.

    A mistake or a bug of any rank counts before the others' complaint that they have lost it; a death that nobody
    explains is None.
    """
    said = [answer for answer, _ in answers if answer is not None]
    failed = [answer for answer in said if answer.failure is not None]
    telling = [answer for answer in failed if not is_about_others(answer.failure)]
    if telling:
        return telling[0]
    died = any(answer is None and not was_killed for answer, was_killed in answers)
    return None if died or failed or answers[0][0] is None else answers[0][0]


def is_about_others(failure: Failure | None) -> bool:
    """Whether a rank only says that it has lost another."""
    return failure is not None and failure.error == LostRank.__name__
