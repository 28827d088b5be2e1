"""Which sequences run: first come, first served, into a fixed number of slots; knows no tokens and no tensors.

Running sequences always fill the slots 0, 1, ... without a gap, so that a step works on a plain slice of the cache.
"""

from collections import deque

from smelt.inference.sequence import Sequence, Status


class Scheduler:
    """Waiting sequences in the order of arrival; `running[slot]` is the sequence in that slot."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    @property
    def has_work(self) -> bool:
        """Whether a step would do something."""
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        """Put a sequence at the end of the queue."""
        self.waiting.append(sequence)

    def admit(self) -> list[Sequence]:
        """Move waiting sequences into the free slots; they are the last of `running`."""
        num_admitted = min(self.num_slots - len(self.running), len(self.waiting))
        admitted = [self.waiting.popleft() for _ in range(num_admitted)]
        for sequence in admitted:
            sequence.status = Status.RUNNING
        self.running += admitted
        return admitted

    def remove(self, sequence: Sequence) -> tuple[int, int] | None:
        """Take a sequence out. Returns (from, to) where another one moved into its slot."""
        if sequence in self.waiting:
            self.waiting.remove(sequence)
            return None
        slot = self.running.index(sequence)
        last = self.running.pop()
        if last is sequence:
            return None
        self.running[slot] = last
        return len(self.running), slot
