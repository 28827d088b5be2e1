"""Scheduler: what each step computes, and who waits; knows no model and no tensors.

A step has room for `max_step_tokens`, or for half of that where sequences are writing. First comes one token for each
of these, then parts of the prompts, shared between their owners: a long prompt comes in chunks and holds up nobody.
Where blocks run out, the youngest sequence gives back its own and is computed anew later.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from smelt.inference.block_tables import BlockTables, Prefix
from smelt.inference.fair_queue import FairQueue
from smelt.inference.sequence import Sequence, Status

CRUMBS = 8  # a share may grow by this part of it to end a prompt: a step for the rest alone costs more


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens `start` up to `end` of a sequence, to be computed in one step."""

    sequence: Sequence
    start: int
    end: int

    @property
    def num_tokens(self) -> int:
        """How many these are."""
        return self.end - self.start

    @property
    def is_last(self) -> bool:
        """Whether the sequence's next token can be drawn after it."""
        return self.end == self.sequence.num_tokens


@dataclass(frozen=True, slots=True)
class Plan:
    """A step: what to copy in the cache, from block to block, and then what to compute; single tokens come first."""

    chunks: list[Chunk]
    copies: list[tuple[int, int]]


class Scheduler:
    """Waiting sequences, in turns between owners, and `running` ones, the oldest first."""

    def __init__(self, tables: BlockTables, max_running: int, max_step_tokens: int) -> None:
        self.tables = tables
        self.max_running = max_running
        self.max_step_tokens = max_step_tokens
        self.running: list[Sequence] = []
        self.total_prompt_tokens = self.total_cached_tokens = self.total_preempted = 0
        self._queue: FairQueue[Sequence] = FairQueue()
        self._preempted: list[Sequence] = []  # they go before all others
        self._next: list[Sequence] = []  # taken from the queue, and waiting for room or for a prefix

    @property
    def has_work(self) -> bool:
        """Whether a step would do something."""
        return bool(self.running or self.num_waiting)

    @property
    def num_waiting(self) -> int:
        """Sequences that hold no blocks now."""
        return len(self._preempted) + len(self._next) + len(self._queue)

    def add(self, sequence: Sequence) -> None:
        """Put a sequence at the end of its owner's queue."""
        sequence.status = Status.WAITING
        self._queue.push(sequence.owner, sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is, with its blocks."""
        for group in (self.running, self._preempted, self._next):
            if sequence in group:
                group.remove(sequence)
                self.tables.release(sequence)
                return
        self._queue.remove(sequence.owner, sequence)

    def preempt_all(self) -> None:
        """Let all that run begin anew, in their order."""
        for sequence in reversed(self.running.copy()):
            self._preempt(sequence)

    def plan(self) -> Plan:
        """What to do next. The caller says what came of it: `tables.mark_computed`, `remove`."""
        chunks = self._next_tokens()
        copies = self._admit()
        # Whoever is writing waits for the whole step: half of one then, for little of the speed.
        most = max(self.max_step_tokens // 2, len(chunks) + 1) if chunks else self.max_step_tokens
        chunks += self._share(most - len(chunks), {chunk.sequence for chunk in chunks})
        return Plan(sorted(chunks, key=lambda chunk: chunk.num_tokens > 1), copies)

    def _next_tokens(self) -> list[Chunk]:
        """The newest token of all that are writing. For lack of blocks the youngest have to wait."""
        chunks = []
        for sequence in self.running.copy():
            if sequence.num_computed != sequence.num_tokens - 1:
                continue
            while sequence.block_ids and not self.tables.grow(sequence):
                self._preempt(self.running[-1])
            if sequence.block_ids:
                chunks.append(Chunk(sequence, sequence.num_computed, sequence.num_tokens))
        return chunks

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.tables.release(sequence)
        sequence.status = Status.WAITING
        self._preempted.insert(0, sequence)
        self.total_preempted += 1

    def _admit(self) -> list[tuple[int, int]]:
        """Let in whom there is room for, with all blocks of its prompt. Returns what to copy.

        Nobody overtakes who waits for room, or large prompts would wait for ever. Who waits for a prefix that another
        computes is overtaken.
        """
        copies: list[tuple[int, int]] = []
        for sequence in self._candidates():
            prefix = self.tables.find_prefix(sequence)
            if prefix.is_coming:
                continue
            # Room to go on for all that run: whom a new sequence drives out would only drive it out again.
            if not self.tables.has_room(sequence, prefix, len(self.running)):
                break
            copies += self.tables.give(sequence, prefix)
            self._run(sequence, prefix)
        return copies

    def _candidates(self) -> Iterator[Sequence]:
        """Who waits, in order, while there are places."""
        for sequence in [*self._preempted, *self._next]:
            if len(self.running) < self.max_running:
                yield sequence
        while self._queue and len(self.running) < self.max_running and len(self._next) < self.max_running:
            self._next.append(self._queue.pop())
            yield self._next[-1]

    def _run(self, sequence: Sequence, prefix: Prefix) -> None:
        if sequence in self._preempted:
            self._preempted.remove(sequence)
        else:
            self._next.remove(sequence)
            sequence.num_cached_tokens = prefix.num_tokens
            self.total_prompt_tokens += len(sequence.prompt_ids)
            self.total_cached_tokens += prefix.num_tokens
        sequence.status = Status.RUNNING
        self.running.append(sequence)

    def _share(self, num_tokens: int, planned: set[Sequence]) -> list[Chunk]:
        """Parts of prompts, so many tokens in all: each owner's share is the same."""
        by_owner: dict[str, list[Sequence]] = {}
        for sequence in self.running:
            if sequence not in planned:
                by_owner.setdefault(sequence.owner, []).append(sequence)
        chunks = []
        # Those who need least come first, so that what they leave of their share goes to the others.
        wishes = sorted(by_owner.values(), key=lambda own: sum(map(_num_left, own)))
        for index, own in enumerate(wishes):
            share = num_tokens // (len(wishes) - index)
            for sequence in _short_ones_first(own, share // 2):
                end = sequence.num_computed + share
                if sequence.num_tokens - end <= share // CRUMBS:
                    end = sequence.num_tokens
                if end > sequence.num_computed:
                    chunks.append(Chunk(sequence, sequence.num_computed, end))
                    share = max(0, share - chunks[-1].num_tokens)
                    num_tokens = max(0, num_tokens - chunks[-1].num_tokens)
        return chunks


def _num_left(sequence: Sequence) -> int:
    return sequence.num_tokens - sequence.num_computed


def _short_ones_first(sequences: list[Sequence], num_tokens: int) -> list[Sequence]:
    """By age, but before the others those that so many tokens complete: a long prompt need not hold up short ones."""
    short = []
    for sequence in sequences:
        if _num_left(sequence) <= num_tokens:
            num_tokens -= _num_left(sequence)
            short.append(sequence)
    return [*short, *(sequence for sequence in sequences if sequence not in short)]
