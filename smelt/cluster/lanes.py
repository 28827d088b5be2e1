"""Lanes: sessions as a worker holds them, and what waits for its turn there; computes nothing, writes nothing.

An operation is done when all before it are. What a lane's grants leave out, and what a lane has lost, is in its log:
that is done again, and nobody is told of it.
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from smelt.cluster.snapshots import Shape
from smelt.inference.service import TextModel
from smelt.training.session import Outcome, SessionTrainer
from smelt.training.trained_adapter import TrainedAdapter
from smelt.training.trained_model import TrainedModel
from smelt.transport.operations import LogEntry
from smelt.types import Datum

MAX_REPLAY_SECONDS = 60.0
MAX_REPLAY_STEPS = 100
MAX_REPLAY_BYTES = 64 * 2**20


@dataclass(eq=False, slots=True)
class Loss:
    """A forward_backward on its way: its data one after the other, so that large ones can be done in pieces."""

    data: tuple[Datum, ...]
    loss_name: str
    loss_settings: Mapping[str, float | str]
    forward_only: bool
    num_begun: int = 0
    outcomes: list[Outcome] = field(default_factory=list)
    error: Exception | None = None

    @property
    def is_over(self) -> bool:
        """Whether all of it is done, or nothing more of it will be."""
        return self.error is not None or len(self.outcomes) == len(self.data)


@dataclass(eq=False, slots=True)
class Operation:
    """Something that is to be done in a lane. `key` None: it was answered before, or fails without being done."""

    seq: int
    kind: str
    body: bytes
    key: str | None = None
    has_failed: bool = False  # as the log has it
    loss: Loss | None = None  # of a forward_backward, once it has begun


@dataclass(eq=False, slots=True)
class Base:
    """A model that sessions stand on, from when it has come."""

    name: str
    text_model: TextModel
    trainer: SessionTrainer


@dataclass(slots=True)
class Toll:
    """What replaying a lane from its last snapshot on would take."""

    seconds: float = 0.0
    num_steps: int = 0
    num_bytes: int = 0

    @property
    def is_high(self) -> bool:
        """Whether a snapshot is due."""
        return (
            self.seconds > MAX_REPLAY_SECONDS or self.num_steps >= MAX_REPLAY_STEPS or self.num_bytes > MAX_REPLAY_BYTES
        )


@dataclass(eq=False, slots=True)
class Lane:
    """A session, or nothing yet while `applied` is None: then it comes from a snapshot or begins with seq 0."""

    id: str
    applied: int | None = None  # the last seq that its state has
    base: Base | None = None
    shape: Shape | None = None
    trained: TrainedAdapter | TrainedModel | None = None
    waiting: dict[int, Operation] = field(default_factory=dict)  # that were granted
    replay: deque[Operation] = field(default_factory=deque)  # of the log
    asked_before: int | None = None  # the log up to there was asked for
    is_recalled: bool = False  # its state is being read
    is_blocked: bool = False  # something is being written or loaded that its next operation waits for
    is_snapshotted: bool = False  # one is being written
    answered_at: float = float("-inf")  # on the monotonic clock
    toll: Toll = field(default_factory=Toll)

    @property
    def next_seq(self) -> int | None:
        """The lowest that was granted."""
        return min(self.waiting, default=None)

    @property
    def last_known(self) -> int:
        """The last seq that its state has, or will have from the log."""
        assert self.applied is not None, "it has a state"
        return self.replay[-1].seq if self.replay else self.applied

    @property
    def num_bytes(self) -> int:
        """Of its weights, their gradient and two moments, in fp32."""
        return 0 if self.trained is None else 16 * self.trained.num_values

    def is_beyond(self, seq: int) -> bool:
        """Whether its state has that seq already, or is about to: where that is granted again, nobody heard of it."""
        return self.applied is not None and (seq <= self.last_known or seq < (self.asked_before or 0))

    @property
    def is_at_rest(self) -> bool:
        """Whether its state is that after `applied`, and nothing is on its way that changes it."""
        is_begun = any(operation.loss is not None for operation in self.waiting.values())
        is_moving = self.is_blocked or self.is_recalled or bool(self.replay) or self.asked_before is not None
        return self.applied is not None and not is_begun and not is_moving

    @property
    def has_gap(self) -> bool:
        """Whether what lies before the next granted operation has to be asked for."""
        following = self.next_seq
        return (
            self.applied is not None
            and following is not None
            and following > self.applied + 1
            and not self.replay
            and self.asked_before is None
        )

    def expects_log(self, after: int, before: int) -> bool:
        """Whether it has asked for this, and not for something else since."""
        return (self.applied, self.asked_before) == (after, before)

    def ready(self) -> list[Operation]:
        """What can be done now, in order: all up to the next gap."""
        if self.applied is None or self.is_blocked or self.asked_before is not None:
            return []
        if self.replay:
            return list(self.replay)
        operations = []
        seq = self.applied + 1
        while seq in self.waiting:
            operations.append(self.waiting[seq])
            seq += 1
        return operations

    def advance(self, operation: Operation) -> None:
        """An operation is done, or has failed."""
        self.applied = operation.seq
        self.toll.num_bytes += len(operation.body)
        self.toll.num_steps += operation.kind == "optim_step"
        if self.replay and self.replay[0] is operation:
            self.replay.popleft()
        else:
            self.waiting.pop(operation.seq, None)

    def take_log(self, entries: tuple[LogEntry, ...], *, is_last: bool) -> None:
        """Put the log before what was granted. A seq that never came counts as a forward_backward that failed."""
        assert self.asked_before is not None, "it was asked for"
        last = self.last_known
        for entry in entries:
            self._miss(last + 1, entry.seq)
            self.replay.append(Operation(entry.seq, entry.kind, entry.body, has_failed=entry.failed))
            last = entry.seq
        if is_last:
            self._miss(last + 1, self.asked_before)
            self.asked_before = None

    def _miss(self, first: int, end: int) -> None:
        self.replay.extend(Operation(seq, "forward_backward", b"", has_failed=True) for seq in range(first, end))
