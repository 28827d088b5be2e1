"""Any course of events, against a model in plain Python: turns, holders, attempts, and nothing left behind."""

from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from sqlalchemy import select

from smelt.errors import SeqAbandoned, SeqReused, StaleEpoch
from smelt.storage import lanes, transitions
from smelt.storage.database import open_database
from smelt.storage.faults import no_fault
from smelt.storage.lanes import Wish
from smelt.storage.tables import futures
from smelt.storage.transitions import Body, Submission, future_id

LANES = st.sampled_from(["a", "b"])
SEQS = st.integers(1, 4)
EPOCHS = st.integers(0, 2)


def wish(epoch: int, limit: int) -> Wish:
    return Wish(epoch, limit, ("step",), ("step",))


@dataclass
class Expected:
    state: str
    fingerprint: str
    epoch: int | None = None
    attempts: int = 0


class Turns(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.engine = open_database("sqlite://")
        self.connection = self.engine.connect()
        self.transaction = self.connection.begin()
        self.epochs = [transitions.open_epoch(self.connection) for _ in range(3)]
        self.expected: dict[tuple[str, int], Expected] = {}
        self.abandoned: set[tuple[str, int]] = set()

    def teardown(self) -> None:
        self.transaction.rollback()
        self.connection.close()
        self.engine.dispose()

    def is_turn(self, place: tuple[str, int], epoch: int) -> bool:
        """Whether a queued future may go to that epoch: all before it are there or given up, none waits or is away."""
        lane, seq = place
        last = self.expected.get((lane, seq - 1))
        if last and last.state != "queued" and last.epoch in self.epochs and last.epoch != epoch:
            return False  # the lane stays with whoever is connected and did the last of it
        before = [(lane, lower) for lower in range(1, seq)]
        return all(
            lower in self.abandoned or (lower in self.expected and self.expected[lower].state != "queued")
            for lower in before
        ) and all(
            future.state != "granted" or future.epoch == epoch
            for (other, _), future in self.expected.items()
            if other == lane
        )

    @rule(lane=LANES, seqs=st.lists(SEQS, min_size=1, max_size=4, unique=True))
    def accept_several(self, lane: str, seqs: list[int]) -> None:
        for seq in seqs:
            self.accept(lane, seq, "x")

    @rule(lane=LANES, seq=SEQS, fingerprint=st.sampled_from(["x", "y"]))
    def accept(self, lane: str, seq: int, fingerprint: str) -> None:
        submission = Submission("ann", "step", fingerprint, b"", lane, seq)

        def accept() -> str:
            return transitions.accept(submission, Body(b"", None), 0.0, no_fault, None, self.connection).id

        there = self.expected.get((lane, seq))
        if (lane, seq) in self.abandoned:
            with pytest.raises(SeqAbandoned):
                accept()
        elif there and there.fingerprint != fingerprint:
            with pytest.raises(SeqReused):
                accept()
        else:
            assert accept() == future_id(lane, seq)
            self.expected.setdefault((lane, seq), Expected("queued", fingerprint))

    @rule(number=EPOCHS, limit=st.sampled_from([1, 2, 10]))
    def grant(self, number: int, limit: int) -> None:
        epoch = self.epochs[number]
        held = [future for future in self.expected.values() if future.state == "granted" and future.epoch == epoch]
        rows = lanes.grant(self.connection, wish(epoch, limit))
        assert len(rows) <= limit
        assert not rows or not any(future.attempts for future in held), "a suspect stays alone"
        for row in rows:
            future = self.expected[row.lane, row.seq]
            assert future.state == "queued"
            assert self.is_turn((row.lane, row.seq), epoch)
            assert row.attempts == future.attempts
            if future.attempts:
                assert (len(rows), held) == (1, []), "a suspect is alone"
            future.state, future.epoch = "granted", epoch
        suspects = [future for future in self.expected.values() if future.attempts and future.state != "done"]
        if len(rows) < limit and not suspects:
            left = [place for place, future in self.expected.items() if future.state == "queued"]
            assert not [place for place in left if self.is_turn(place, epoch)], "work was held back"

    @rule(lane=LANES, seq=SEQS, number=EPOCHS)
    def finish(self, lane: str, seq: int, number: int) -> None:
        epoch = self.epochs[number]
        future = self.expected.get((lane, seq))
        arguments = (future_id(lane, seq), epoch, Body(b"", None), None, 0.0, no_fault, self.connection)
        if future and future.state == "granted" and future.epoch == epoch:
            transitions.finish(*arguments)
            future.state = "done"
        else:
            with pytest.raises(StaleEpoch):
                transitions.finish(*arguments)

    @precondition(lambda self: any(future.state == "granted" for future in self.expected.values()))
    @rule(data=st.data())
    def finish_one(self, data: Any) -> None:
        granted = sorted(place for place, future in self.expected.items() if future.state == "granted")
        lane, seq = data.draw(st.sampled_from(granted))
        self.finish(lane, seq, self.epochs.index(self.expected[lane, seq].epoch))

    @rule(number=EPOCHS, died=st.booleans())
    def release(self, number: int, died: bool = True) -> None:
        epoch = self.epochs[number]
        failed = lanes.release(self.connection, epoch, died, 0.0)
        expected = []
        for (lane, seq), future in self.expected.items():
            if future.state == "granted" and future.epoch == epoch:
                future.attempts += died
                future.state = "failed" if future.attempts == 3 else "queued"
                future.epoch = None
                expected += [future_id(lane, seq)] if future.state == "failed" else []
        assert sorted(failed) == sorted(expected)
        with pytest.raises(StaleEpoch):
            lanes.grant(self.connection, wish(epoch, 1))
        self.epochs[number] = transitions.open_epoch(self.connection)

    @precondition(lambda self: self.expected)
    @rule(data=st.data())
    def cancel(self, data: Any) -> None:
        lane, seq = data.draw(st.sampled_from(sorted(self.expected)))
        future = self.expected[lane, seq]
        unfinished = future.state in ("queued", "granted")
        assert transitions.cancel("ann", future_id(lane, seq), 0.0, self.connection) == unfinished
        if unfinished:
            future.state = "cancelled"

    @rule()
    def abandon(self) -> None:
        holes = lanes.holes(self.connection)
        for (lane, missing), waiting in holes.items():
            assert (lane, missing) not in self.expected
            assert self.expected[lane, waiting].state == "queued"
            self.abandoned |= {(lane, seq) for seq in range(missing, waiting) if (lane, seq) not in self.expected}
        lanes.abandon(self.connection, holes)

    @rule()
    def restart(self) -> None:
        lanes.recover(self.connection)
        for future in self.expected.values():
            if future.state == "granted":
                future.state = "queued"
        self.epochs = [transitions.open_epoch(self.connection) for _ in range(3)]

    @invariant()
    def the_rows_are_as_expected(self) -> None:
        rows = self.connection.execute(select(futures.c.lane, futures.c.seq, futures.c.state, futures.c.attempts))
        expected = {place: (future.state, future.attempts) for place, future in self.expected.items()}
        assert {(row.lane, row.seq): (row.state, row.attempts) for row in rows} == expected


TestTurns = Turns.TestCase
TestTurns.settings = settings(max_examples=60, stateful_step_count=30, deadline=None, derandomize=True)


def test_what_comes_back_goes_before_what_came_meanwhile() -> None:
    turns = Turns()
    turns.accept_several("a", [2, 1])
    turns.grant(0, 10)
    turns.restart()
    turns.accept("a", 3, "x")
    assert [row.seq for row in lanes.grant(turns.connection, wish(turns.epochs[0], 10))] == [1, 2, 3]
    turns.teardown()


def test_nothing_joins_a_suspect() -> None:
    turns = Turns()
    turns.accept("a", 1, "x")
    turns.grant(0, 10)
    turns.release(0)
    turns.accept("b", 1, "x")
    suspect_first = [lanes.grant(turns.connection, wish(turns.epochs[0], 10)) for _ in range(2)]
    assert [[row.lane for row in rows] for rows in suspect_first] == [["a"], []]
    turns.teardown()
