"""Scheduler: what each step computes, and who waits; knows no model and no tensors.

A step has room for `max_step_tokens`, or for half of that where sequences are writing. First comes one token for each
of these, then parts of the prompts, shared between their owners: a long prompt comes in chunks and holds up nobody.
Where blocks run out, the youngest sequence gives back its own and is computed anew later.

Live sequences, for which somebody waits, go before those of batches: their prompts are computed first, they are let in
first, and batches give up places and blocks to them.
"""

from dataclasses import dataclass

from smelt.inference.block_tables import BlockTables, Prefix
from smelt.inference.sequence import Sequence, Status
from smelt.inference.waiting_line import WaitingLine

CRUMBS = 8  # a share may grow by this part of it to end a prompt: a step for the rest alone costs more
# Prompts of batches fill a step up to this part of it only: whoever comes meanwhile waits for its end. A tenth of the
# speed is lost so.
BATCH_PART = 4
# So many live sequences are let in before one of a batch counts as live, where both wait. Live ones hardly notice it,
# and a thousand lines are done within their day where somebody new comes every five seconds.
MAX_OVERTAKING = 16


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
    """Two waiting lines, and `running` sequences: live ones first, and of each kind the oldest."""

    def __init__(self, tables: BlockTables, max_running: int, max_step_tokens: int) -> None:
        self.tables = tables
        self.max_running = max_running
        self.max_step_tokens = max_step_tokens
        self.running: list[Sequence] = []
        self.total_prompt_tokens = self.total_cached_tokens = self.total_preempted = 0
        self._live = WaitingLine(max_running)
        self._batch = WaitingLine(max_running)
        self._num_overtaking = 0  # live sequences that were let in while one of a batch had to wait

    @property
    def has_work(self) -> bool:
        """Whether a step would do something."""
        return bool(self.running or self.num_waiting)

    @property
    def num_waiting(self) -> int:
        """Sequences that hold no blocks now."""
        return len(self._live) + len(self._batch)

    def add(self, sequence: Sequence) -> None:
        """Put a sequence at the end of its owner's queue."""
        sequence.status = Status.WAITING
        self._line_of(sequence).push(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is, with its blocks."""
        if sequence in self.running:
            self.running.remove(sequence)
            self.tables.release(sequence)
        else:
            self._line_of(sequence).remove(sequence)

    def preempt_all(self) -> None:
        """Let all that run begin anew, in their order."""
        for sequence in reversed(self.running.copy()):
            self._preempt(sequence)

    def plan(self) -> Plan:
        """What to do next. The caller says what came of it: `tables.mark_computed`, `remove`."""
        self._promote()
        writing = self._grow()
        copies = self._admit()
        # Those that have not had to make way since.
        chunks = [Chunk(each, each.num_computed, each.num_tokens) for each in writing if _is_writing(each)]
        # Whoever is writing waits for the whole step: half of one then, for little of the speed.
        most = max(self.max_step_tokens // 2, len(chunks) + 1) if chunks else self.max_step_tokens
        chunks += self._prompts(most - len(chunks), {chunk.sequence for chunk in chunks})
        return Plan(sorted(chunks, key=lambda chunk: chunk.num_tokens > 1), copies)

    def _line_of(self, sequence: Sequence) -> WaitingLine:
        return self._live if sequence.is_live else self._batch

    def _promote(self) -> None:
        """Let the oldest sequence of a batch count as live once enough live ones have overtaken it."""
        if self._num_overtaking < MAX_OVERTAKING:
            return
        self._num_overtaking = 0
        if behind := self._behind():
            self.running.remove(behind[0])
            behind[0].is_live = True
            self._insert(behind[0])
        elif (sequence := self._live.take_first(self._batch)) is not None:
            sequence.is_live = True

    def _grow(self) -> list[Sequence]:
        """Those that are writing, with a block for the newest token. For lack of blocks the youngest have to wait."""
        writing = [sequence for sequence in self.running if _is_writing(sequence)]
        for sequence in writing:
            while sequence.block_ids and not self.tables.grow(sequence):
                self._preempt(self.running[-1])
        return writing

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.tables.release(sequence)
        sequence.status = Status.WAITING
        self._line_of(sequence).put_back(sequence)
        self.total_preempted += 1

    def _admit(self) -> list[tuple[int, int]]:
        """Let in whom there is room for, with all blocks of its prompt. Returns what to copy.

        Nobody overtakes who waits for room, or large prompts would wait for ever. Who waits for a prefix that another
        computes is overtaken.
        """
        copies: list[tuple[int, int]] = []
        for line in (self._live, self._batch):
            candidates = line.candidates()
            while self._has_place(line) and (sequence := next(candidates, None)) is not None:
                prefix = self.tables.find_prefix(sequence)
                if prefix.is_coming:
                    continue
                if not self._make_room(sequence, prefix):
                    return copies
                copies += self.tables.give(sequence, prefix)
                self._run(sequence, prefix)
        return copies

    def _has_place(self, line: WaitingLine) -> bool:
        return len(self.running) < self.max_running or (line is self._live and not self.running[-1].is_live)

    def _make_room(self, sequence: Sequence, prefix: Prefix) -> bool:
        """Whether a sequence can be let in now. For a live one those of batches make way, unless that is in vain."""
        behind = [each for each in self.running if sequence.is_live and not each.is_live]
        num_ahead, num_blocks = len(self.running) - len(behind), sum(len(each.block_ids) for each in behind)
        if not self.tables.has_room(sequence, prefix, num_ahead - num_blocks):
            return False
        # Room to go on for all that run: whom a new sequence drives out would only drive it out again.
        while len(self.running) == self.max_running or not self.tables.has_room(sequence, prefix, len(self.running)):
            if not behind:
                return False
            self._preempt(behind.pop())
        return True

    def _run(self, sequence: Sequence, prefix: Prefix) -> None:
        line = self._line_of(sequence)
        if not line.has_run(sequence):
            sequence.num_cached_tokens = prefix.num_tokens
            self.total_prompt_tokens += len(sequence.prompt_ids)
            self.total_cached_tokens += prefix.num_tokens
            self._num_overtaking += sequence.is_live and bool(self._batch or self._behind())
        line.remove(sequence)
        sequence.status = Status.RUNNING
        self._insert(sequence)

    def _insert(self, sequence: Sequence) -> None:
        num_live = sum(each.is_live for each in self.running)
        self.running.insert(num_live if sequence.is_live else len(self.running), sequence)

    def _behind(self) -> list[Sequence]:
        """Sequences of batches that hold blocks, and whose prompts are not computed."""
        return [each for each in self.running if not (each.is_live or _is_writing(each))]

    def _prompts(self, num_tokens: int, planned: set[Sequence]) -> list[Chunk]:
        """Parts of prompts, so many tokens in all. In a step with live ones, which ends the sooner so, batches wait."""
        rest = [sequence for sequence in self.running if sequence not in planned]
        if live := [sequence for sequence in rest if sequence.is_live]:
            return _share(num_tokens, live)
        return _share(min(num_tokens, max(1, self.max_step_tokens // BATCH_PART)), rest)


def _share(num_tokens: int, sequences: list[Sequence]) -> list[Chunk]:
    """Parts of their prompts, so many tokens in all: each owner's share is the same."""
    by_owner: dict[str, list[Sequence]] = {}
    for sequence in sequences:
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


def _is_writing(sequence: Sequence) -> bool:
    return bool(sequence.block_ids) and sequence.num_computed == sequence.num_tokens - 1


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
