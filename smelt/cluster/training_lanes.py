"""TrainingLanes: does sessions' operations on the inference server's thread, in each lane's order; no sockets.

A lane that is not in memory comes back from its newest snapshot and the log behind that. Files are written by a
thread of their own; a lane waits for those that its next answer stands on. What `forward_backward`s wait at the heads
of lanes is computed in one pass.
"""

import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from smelt.cluster import losses
from smelt.cluster.held_models import HeldModels
from smelt.cluster.lanes import Base, Lane, Operation, Toll
from smelt.cluster.losses import Pace, Turn
from smelt.cluster.samples import sampling_of
from smelt.cluster.session_operations import SessionOperations, made, trained_of
from smelt.cluster.snapshots import Shape, Snapshot, Snapshots
from smelt.errors import CheckpointError, SmeltError, TrainingError
from smelt.inference.jobs import explained
from smelt.inference.server import InferenceServer
from smelt.storage.faults import Fault, no_fault
from smelt.training.trained_weights import OptimSettings
from smelt.transport.failures import error_of
from smelt.transport.messages import Grant, LogPart, LogWanted, SnapshotKept, SnapshotTaken
from smelt.transport.operations import (
    Sample,
    Sampler,
    SaveForSampler,
)

GATHER_SECONDS = 0.001  # that a pass waits for losses of others
MAX_HELD_BYTES = 4 * 2**30  # of sessions in memory; beyond, those that nobody asked for longest leave
LIVELY_SECONDS = 0.05  # after which a lane that was answered is not expected any more

T = TypeVar("T")

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Answered:
    """An operation is done, or has failed."""

    key: str
    body: bytes = b""
    error: Exception | None = None


@dataclass(frozen=True, slots=True)
class Note:
    """Something to be said over the connection of that epoch, and no other."""

    epoch: int
    message: LogWanted | SnapshotTaken


Told = Answered | Note


class TrainingLanes:
    """`begin` operations; `tell` gets, on the server's thread, what is to be said of them: it must not block."""

    def __init__(
        self, server: InferenceServer, home: Path, tell: Callable[[list[Told]], None], fault: Fault = no_fault
    ) -> None:
        self._server = server
        self.home = home
        self._tell = tell
        self.fault = fault
        self._snapshots = Snapshots(home, fault)
        self._models = HeldModels(server, self._leave)
        self._operations = SessionOperations(self, home, self._models)
        self._lanes: dict[str, Lane] = {}
        self._told: list[Told] = []
        self._restored: dict[str, list[Callable[[Exception | None], None]]] = {}  # by the key of an operation of ours
        self._pace = Pace()
        self._may_release = False  # models, where a session has ended or failed
        self._losses_since: float | None = None  # since when some wait for a pass
        self._epoch = 0  # of the connection over which it was granted something last
        self._writer = ThreadPoolExecutor(1, "session-writer")
        server.accompany(self, home)

    def begin(self, key: str, grant: Grant) -> None:
        """Have an operation done: an Answered with this key will tell of it."""
        self._server.do(partial(self._begin, key, grant))

    def sample(self, key: str, grant: Grant, request: Sample) -> None:
        """Have the server draw samples; a sampler whose files were lost is made again first.

        The server tells what comes of it, or an Answered that the sampler could not be made.
        """
        self._server.do(partial(self._sample, key, grant, request))

    def cancel(self, key: str) -> None:
        """An operation that nobody wants any more has failed, unless it is done."""
        self._server.do(partial(self._cancel, key))

    def take_log(self, part: LogPart) -> None:
        """What was asked for."""
        self._server.do(partial(self._take_log, part))

    def take_kept(self, kept: SnapshotKept) -> None:
        """All that is older than the snapshot before is of no use any more."""
        self._writer.submit(self._snapshots.keep_two, kept.lane, kept.seq)

    def hang_up(self) -> None:
        """Nobody hears any more what comes of what was begun: it will be granted again."""
        self._server.do(self._hang_up)

    def close(self) -> None:
        """Write nothing any more but what is being written."""
        self._writer.shutdown(wait=True, cancel_futures=True)

    # --- The server's thread ---------------------------------------------------------------------------------

    def next_turn(self) -> float | None:
        """At once where something can be done or told; losses wait a moment for those that may be on their way."""
        heads = [ready[0] for lane in self._lanes.values() if (ready := lane.ready())]
        if self._told or self._may_release or not all(map(_is_loss, heads)):
            return 0.0
        if not heads:
            self._losses_since = None
            return None
        now = time.monotonic()
        self._losses_since = self._losses_since or now
        are_more = any(not lane.waiting and now - lane.answered_at < LIVELY_SECONDS for lane in self._lanes.values())
        return self._losses_since + (GATHER_SECONDS if are_more else 0)

    def step(self, *, is_shared: bool) -> None:
        """All that is quick, and then one pass of losses."""
        for lane in list(self._lanes.values()):
            while (ready := lane.ready()) and not _is_loss(ready[0]):
                self._apply(lane, ready[0])
        self._do_losses(is_shared=is_shared)
        self._make_room()
        if self._may_release:
            self._may_release = False
            self._models.release_all_but({lane.base.name for lane in self._lanes.values() if lane.base is not None})
        self._flush()

    def _begin(self, key: str, grant: Grant) -> None:
        assert grant.lane is not None, "a session is a lane"
        assert grant.seq is not None, "and has an order"
        self.fault("before_operation")
        self._epoch = grant.epoch
        lane = self._lanes.get(grant.lane) or self._lanes.setdefault(grant.lane, Lane(grant.lane))
        if lane.is_beyond(grant.seq):
            lane = self.renew(lane)
        lane.waiting[grant.seq] = Operation(grant.seq, grant.kind, grant.body, key)
        self._look_after(lane)

    def _cancel(self, key: str) -> None:
        for lane in self._lanes.values():
            for operation in [each for each in lane.waiting.values() if each.key == key and not lane.is_blocked]:
                del lane.waiting[operation.seq]
                self._told.append(Answered(key, error=SmeltError("it was cancelled")))

    def _sample(self, key: str, grant: Grant, request: Sample) -> None:
        def go_on(error: Exception | None) -> None:
            if error is None:
                self._server.sample(key, *sampling_of(key, grant.owner, request, self.home))
            else:
                self._told.append(Answered(key, error=error))

        self._epoch = grant.epoch
        sampler = request.sampler
        if sampler.folder is None or sampler.lane is None or (self.home / sampler.folder).is_dir():
            go_on(None)
        else:
            self._restore_sampler(sampler, go_on)

    def _restore_sampler(self, sampler: Sampler, then: Callable[[Exception | None], None]) -> None:
        """Have its lane come to that place again, and save it there; then the lane comes back to where it was."""
        assert sampler.lane is not None, "a named one is as durable as anything"
        assert sampler.seq is not None, "it was made in that lane"
        key = f"sessions/{sampler.sampler_id}"
        self._restored.setdefault(key, []).append(then)
        if len(self._restored[key]) > 1:
            return
        log.warning("the files of the sampler %s are gone: it is made again", sampler.sampler_id)
        lane = self._lanes.get(sampler.lane) or self._lanes.setdefault(sampler.lane, Lane(sampler.lane))
        if lane.is_beyond(sampler.seq):
            lane = self.renew(lane)
        body = msgspec.msgpack.encode(SaveForSampler(sampler.folder or "", sampler.sampler_id))
        lane.waiting[sampler.seq] = Operation(sampler.seq, "save_weights_for_sampler", body, key)
        self._look_after(lane)

    def _hang_up(self) -> None:
        self._told.clear()
        self._restored.clear()
        for lane in list(self._lanes.values()):
            is_at_rest = lane.is_at_rest
            lane.waiting.clear()
            if not is_at_rest:
                self._forget(lane)

    def _flush(self) -> None:
        told, self._told = self._told, []
        if told:
            self._tell(told)

    # --- Lanes come and go -----------------------------------------------------------------------------------

    def _look_after(self, lane: Lane) -> None:
        """See to it that what waits can be done."""
        first = lane.next_seq
        if first is None or not self.is_held(lane):
            return
        if lane.applied is None and not lane.is_recalled:
            self._recall(lane, first)
        if lane.has_gap:
            assert lane.applied is not None, "else there is no gap yet"
            lane.asked_before = first
            self._told.append(Note(self._epoch, LogWanted(lane.id, lane.applied, first)))

    def _recall(self, lane: Lane, first: int) -> None:
        """Begin with the newest snapshot before an operation, or with nothing."""
        if first == 0 or lane.waiting[first].kind == "unload_model":
            lane.applied = first - 1
            return
        lane.is_recalled = True
        self._restore(lane, self._snapshots.newest_first(lane.id, first))

    def _restore(self, lane: Lane, snapshots: list[Snapshot]) -> None:
        """From the first that is sound."""
        for index, snapshot in enumerate(snapshots):
            try:
                shape = snapshot.shape()
            except CheckpointError as damage:
                log.warning("%s", damage)
                continue
            come = partial(self._read_snapshot, lane, snapshots[index:], shape)
            self._models.need(shape.base_model, come, partial(self._lose, lane))
            return
        lane.is_recalled, lane.applied = False, -1
        self._look_after(lane)

    def _read_snapshot(self, lane: Lane, snapshots: list[Snapshot], shape: Shape, base: Base) -> None:
        if not self.is_held(lane):
            return
        try:
            trained = made(base, shape)
            snapshots[0].read(trained)
        except CheckpointError as damage:
            log.warning("%s", damage)
            self._restore(lane, snapshots[1:])
            return
        except Exception as error:  # noqa: BLE001 - no memory for it, most likely
            self._lose(lane, error)
            return
        lane.base, lane.shape, lane.trained = base, shape, trained
        lane.applied, lane.is_recalled = snapshots[0].seq, False
        self._look_after(lane)

    def _take_log(self, part: LogPart) -> None:
        lane = self._lanes.get(part.lane)
        if lane is None or not lane.expects_log(part.after, part.before):
            return
        if part.failure is not None:
            self._lose(lane, error_of(part.failure))
            return
        lane.take_log(part.entries, is_last=part.is_last)

    def _lose(self, lane: Lane, error: Exception) -> None:
        """A lane cannot be brought back: what waits there fails."""
        if not self.is_held(lane):
            return
        ours = [operation for operation in lane.waiting.values() if operation.key in self._restored]
        lost = ours or list(lane.waiting.values())  # a sampler that cannot be made again is no reason for others
        for operation in lost:
            del lane.waiting[operation.seq]
            self._say(operation, error=explained(error, lane.id))
        self._look_after(self.renew(lane))

    def is_held(self, lane: Lane) -> bool:
        """Whether it is still this one that stands for its session."""
        return self._lanes.get(lane.id) is lane

    def renew(self, lane: Lane) -> Lane:
        """Begin anew with a lane, whose state is of no use."""
        self._forget(lane)
        again = self._lanes[lane.id] = Lane(lane.id, waiting=lane.waiting)
        for operation in again.waiting.values():
            operation.loss = None
        return again

    def _make_room(self) -> None:
        """Let idle sessions leave for the disk while all together are too large."""
        held = [lane for lane in self._lanes.values() if lane.trained is not None]
        num_bytes = sum(lane.num_bytes for lane in held)
        idle = [lane for lane in held if lane.is_at_rest and not lane.waiting and not lane.is_snapshotted]
        newest = max(held, key=lambda lane: lane.answered_at, default=None)  # stays, however large it is
        for lane in sorted((lane for lane in idle if lane is not newest), key=lambda lane: lane.answered_at):
            if num_bytes <= MAX_HELD_BYTES:
                return
            num_bytes -= lane.num_bytes
            assert lane.applied is not None, "it is at rest"
            lane.is_blocked = True
            self.snapshot(lane, lane.applied, then=partial(self._put_away, lane))

    def _put_away(self, lane: Lane, error: BaseException | None) -> None:
        if error is None and not lane.waiting:
            self._forget(lane)

    def unload(self, lane: Lane) -> None:
        """A session is over, and with it its snapshots."""
        self.beside(partial(self._snapshots.remove_all, lane.id), lambda _: None)
        if self.is_held(lane):
            self._forget(lane)

    def _forget(self, lane: Lane) -> None:
        """Whatever comes of it now finds nobody."""
        del self._lanes[lane.id]
        lane.base = lane.applied = None
        self._may_release = True

    def _leave(self, base: Base) -> None:
        """Others want a model to be gone. Sessions come back when they are asked for."""
        for lane in [lane for lane in self._lanes.values() if lane.base is base]:
            self._look_after(self.renew(lane))

    # --- Operations ------------------------------------------------------------------------------------------

    def _apply(self, lane: Lane, operation: Operation) -> None:
        """Do one that is no loss, or begin to."""
        if operation.has_failed:
            _void(lane, operation)
            self.advance(lane, operation)
            return
        try:
            self._operations.do(lane, operation)
        except Exception as error:  # noqa: BLE001 - whatever it was, it is this operation's
            self.fail(lane, operation, error)

    def answer(self, lane: Lane, operation: Operation, **answer: Any) -> None:
        """An operation is done, with JSON."""
        if operation.key is not None:
            self._say(operation, msgspec.json.encode({"type": operation.kind, **answer}))
        self.advance(lane, operation)

    def fail(self, lane: Lane, operation: Operation, error: BaseException) -> None:
        """An operation has failed; where it had not before, its lane cannot be brought back."""
        if operation.key is None:
            self._lose(lane, TrainingError(f"{lane.id} cannot be computed again: seq {operation.seq}: {error}"))
            return
        _void(lane, operation)
        self._say(operation, error=explained(error, operation.key))
        self._may_release = True
        self.advance(lane, operation)

    def _say(self, operation: Operation, body: bytes = b"", error: Exception | None = None) -> None:
        """Tell what came of an operation, whoever asked for it."""
        assert operation.key is not None, "else nobody did"
        self.fault("after_operation")
        if operation.key in self._restored:
            for then in self._restored.pop(operation.key):
                then(error)
        else:
            self._told.append(Answered(operation.key, body, error))

    def advance(self, lane: Lane, operation: Operation) -> None:
        """An operation is done, whether anybody is told or not."""
        lane.advance(operation)
        lane.answered_at = time.monotonic()
        if lane.toll.is_high and lane.trained is not None and not lane.is_snapshotted and not lane.is_blocked:
            self.snapshot(lane, operation.seq)
        self._look_after(lane)

    # --- Losses ----------------------------------------------------------------------------------------------

    def _do_losses(self, *, is_shared: bool) -> None:
        waiting = [lane for lane in self._lanes.values() if (ready := lane.ready()) and _is_loss(ready[0])]
        for lane in waiting:
            self._begin_loss(lane)
        waiting = [lane for lane in waiting if lane.base is not None and lane.ready()]
        if not waiting:
            return
        base = waiting[0].base
        assert base is not None, "they have one"
        lines = [(lane, self._turns(lane)) for lane in waiting if lane.base is base]
        turns = losses.choose(lines, self._pace.budget(is_shared=is_shared))
        self._losses_since = None
        if turns:
            losses.compute(base.trainer, turns, self._pace)
        for lane, _ in lines:
            self._end_losses(lane)
            if self.is_held(lane):  # others are first next time
                self._lanes[lane.id] = self._lanes.pop(lane.id)

    def _begin_loss(self, lane: Lane) -> None:
        """Read the first loss of a lane, if it can be."""
        while (ready := lane.ready()) and _is_loss(ready[0]) and ready[0].loss is None:
            try:
                trained_of(lane)
                ready[0].loss = losses.begun(ready[0].body)
            except Exception as error:  # noqa: BLE001 - what is wrong with the request
                self.fail(lane, ready[0], error)

    def _turns(self, lane: Lane) -> Iterator[Turn]:
        """The data of a lane whose turn it is, up to what is no loss."""
        trained = trained_of(lane)
        for operation in lane.ready():
            if not _is_loss(operation):
                return
            try:
                loss = operation.loss = operation.loss or losses.begun(operation.body)
            except Exception:  # noqa: BLE001 - it fails when it is the first
                return
            while loss.num_begun < len(loss.data):
                loss.num_begun += 1
                yield Turn(lane, loss, loss.num_begun - 1, trained)

    def _end_losses(self, lane: Lane) -> None:
        for operation in lane.ready():
            loss = operation.loss
            if loss is None or not loss.is_over or not self.is_held(lane):
                return
            if loss.error is not None:
                self.fail(lane, operation, loss.error)
                continue
            if operation.key is not None:
                self._say(operation, losses.result_of(loss))
            self.advance(lane, operation)

    # --- Files -----------------------------------------------------------------------------------------------

    def snapshot(self, lane: Lane, seq: int, then: Callable[[BaseException | None], None] | None = None) -> None:
        """Write the state after a seq beside what goes on; `then` is what its lane waits with."""
        assert lane.shape is not None, "it is open"
        assert lane.trained is not None, "it is open"
        epoch = self._epoch
        lane.is_snapshotted, lane.toll = True, Toll()

        def written(writing: "Future[int]") -> None:
            if not self.is_held(lane):
                return
            lane.is_snapshotted = False
            error = writing.exception()
            if error is not None:
                log.error("cannot write a snapshot of %s: %s", lane.id, error)
            if then is not None:
                lane.is_blocked = False
                then(error)
            if error is None:
                self._told.append(Note(epoch, SnapshotTaken(lane.id, seq, writing.result())))

        state = lane.trained.state()
        self.beside(partial(self._snapshots.write, lane.id, seq, lane.shape, state), written)

    def beside(self, work: Callable[[], T], take: "Callable[[Future[T]], None]") -> None:
        """Do something on the writer's thread, and take what comes of it on the server's."""
        done = self._writer.submit(work)
        done.add_done_callback(lambda done: self._server.do(partial(take, done)))


def _is_loss(operation: Operation) -> bool:
    return operation.kind == "forward_backward" and not operation.has_failed


def _void(lane: Lane, operation: Operation) -> None:
    """What an operation that has failed does to the window that it is in."""
    if lane.trained is None:
        return
    if operation.kind in ("forward_backward", "optim_step"):
        lane.trained.fail_window()
    if operation.kind == "optim_step":
        with suppress(TrainingError):
            lane.trained.step(OptimSettings())
