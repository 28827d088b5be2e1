"""WaitingLine: sequences that hold no blocks now, in the order in which they are let in; knows no steps."""

from collections.abc import Iterator

from smelt.inference.fair_queue import FairQueue
from smelt.inference.sequence import Sequence


class WaitingLine:
    """First those that ran already, then those that have been looked at, then all others, in turns between owners.

    Of those that have been looked at, and wait for room or for a prefix, there are `max_next` at most.
    """

    def __init__(self, max_next: int) -> None:
        self._max_next = max_next
        self._preempted: list[Sequence] = []
        self._next: list[Sequence] = []
        self._queue: FairQueue[Sequence] = FairQueue()

    def __len__(self) -> int:
        return len(self._preempted) + len(self._next) + len(self._queue)

    def push(self, sequence: Sequence) -> None:
        """Put a sequence at the end of its owner's queue."""
        self._queue.push(sequence.owner, sequence)

    def put_back(self, sequence: Sequence) -> None:
        """Let a sequence that was preempted come before all others."""
        self._preempted.insert(0, sequence)

    def candidates(self) -> Iterator[Sequence]:
        """Who waits, in order; whoever is let in meanwhile is to be removed."""
        yield from [*self._preempted, *self._next]
        while self._queue and len(self._next) < self._max_next:
            self._next.append(self._queue.pop())
            yield self._next[-1]

    def has_run(self, sequence: Sequence) -> bool:
        """Whether a sequence was preempted."""
        return sequence in self._preempted

    def take_first(self, other: "WaitingLine") -> Sequence | None:
        """Let the first of another line, if there is one, wait in this one, before those that nobody has looked at."""
        sequence = next(other.candidates(), None)
        if sequence is not None:
            (self._preempted if other.has_run(sequence) else self._next).append(sequence)
            other.remove(sequence)
        return sequence

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out that is there."""
        for group in (self._preempted, self._next):
            if sequence in group:
                group.remove(sequence)
                return
        self._queue.remove(sequence.owner, sequence)
