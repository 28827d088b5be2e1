"""Workers that wait for work: with each change all of them are asked for at once; knows no SQL and no request.

The methods belong to one event loop. Whoever waits is woken by what it gets, and by nothing else.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

from sqlalchemy import Connection

from smelt.errors import StaleEpoch, StorageError
from smelt.storage import lanes as turns
from smelt.storage.lanes import Wish
from smelt.storage.tables import AnyRow
from smelt.storage.writer import Operation, Writer


@dataclass(eq=False, slots=True)
class Demand:
    """A wish, and who waits for it."""

    wish: Wish
    answer: asyncio.Future[list[AnyRow]] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    @property
    def place(self) -> tuple[int, tuple[str, ...]]:
        """Of two demands with the same place the second goes on where the first has ended."""
        return self.wish.epoch, self.wish.kinds


@dataclass(frozen=True, slots=True)
class Moment:
    """How much had happened when the writer was asked."""

    num_changes: int = 0
    num_endings: int = 0  # of connections


class Demands:
    """Those who wait, and when the writer had nothing more for them."""

    def __init__(self, writer: Writer) -> None:
        self._writer = writer
        self._waiting: list[Demand] = []  # those for whom the writer has nothing, as far as is known
        self._now = Moment()
        self._satisfied: dict[tuple[int, tuple[str, ...]], Moment] = {}

    async def rows(self, wish: Wish) -> list[AnyRow]:
        """Wait until there is something to grant. StaleEpoch where the connection is over."""
        demand = Demand(wish)
        if self._satisfied.pop(demand.place, None) == self._now:
            self._waiting.append(demand)  # it had all there was, and nothing has changed: the next change asks again
        else:
            self._writer.submit([self._grants([demand], self._now, only_ready=False)])
        return await demand.answer

    def with_change(self) -> list[Operation]:
        """What belongs into the commit of a change that is about to be submitted: grants for those who wait."""
        self._now = Moment(self._now.num_changes + 1, self._now.num_endings)
        return self._asked(only_ready=True)

    def with_ending(self, epoch: int) -> list[Operation]:
        """The same where the change ends a connection: those who wait for it shall hear."""
        self._now = Moment(self._now.num_changes + 1, self._now.num_endings + 1)
        self._satisfied = {place: moment for place, moment in self._satisfied.items() if place[0] != epoch}
        return self._asked(only_ready=False)

    def _asked(self, *, only_ready: bool) -> list[Operation]:
        demands, self._waiting = [each for each in self._waiting if not each.answer.done()], []
        return [self._grants(demands, self._now, only_ready)] if demands else []

    def _grants(self, demands: list[Demand], now: Moment, only_ready: bool) -> Operation:
        """Nobody waits for the disk: a grant that is lost with the power was to be redone anyway."""
        answer: asyncio.Future[list[list[AnyRow] | StaleEpoch]] = asyncio.get_running_loop().create_future()
        answer.add_done_callback(partial(self._deliver, demands, now))
        return Operation(partial(_granted, demands, only_ready), durable=False, answer=answer)

    def _deliver(
        self, demands: list[Demand], asked: Moment, answer: asyncio.Future[list[list[AnyRow] | StaleEpoch]]
    ) -> None:
        error = answer.exception()
        outcomes = [error] * len(demands) if error is not None else answer.result()
        for demand, outcome in zip(demands, outcomes, strict=True):
            if demand.answer.done():
                continue  # it waits no longer
            if isinstance(outcome, BaseException):
                demand.answer.set_exception(outcome)
            elif outcome:
                demand.answer.set_result(outcome)
                if len(outcome) < demand.wish.limit:
                    self._satisfied[demand.place] = asked
            else:
                self._waiting.append(demand)
        if asked != self._now:
            self._ask_again(asked)

    def _ask_again(self, asked: Moment) -> None:
        """Something has changed while the writer was at it."""
        demands = list(self._waiting)
        operations = self._asked(only_ready=asked.num_endings == self._now.num_endings)
        try:
            if operations:
                self._writer.submit(operations)
        except StorageError as closed:
            for demand in demands:
                if not demand.answer.done():
                    demand.answer.set_exception(closed)


def _granted(demands: Sequence[Demand], only_ready: bool, connection: Connection) -> list[list[AnyRow] | StaleEpoch]:
    """One that waits no longer when this begins gets nothing."""
    wishes = [None if demand.answer.cancelled() else demand.wish for demand in demands]
    return turns.grant_each(connection, wishes, only_ready=only_ready)
