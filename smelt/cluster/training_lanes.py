"""TrainingLanes: does sessions' operations on the inference server's thread, in each lane's order; no sockets.

A lane that is not in memory comes back from its newest snapshot and the log behind that. Files are written by a
thread of their own; a lane waits for those that its next answer stands on. What `forward_backward`s wait at the heads
of lanes is computed in one pass.
"""

import copy
import logging
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
from smelt.cluster.snapshots import Shape, Snapshot, Snapshots, shape_of, write_folder
from smelt.errors import CheckpointError, InvalidInput, SmeltError, TrainingError
from smelt.inference.jobs import explained
from smelt.inference.server import InferenceServer
from smelt.training.trained_adapter import OptimSettings, TrainedAdapter
from smelt.transport.failures import error_of
from smelt.transport.messages import Grant, LogPart, LogWanted, SnapshotKept, SnapshotTaken
from smelt.transport.operations import CreateModel, LoadWeights, OptimStep, SaveForSampler, SaveWeights

T = TypeVar("T")

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Answered:
    """An operation is done, or has failed."""

    key: str
    body: bytes = b""
    error: Exception | None = None


Told = Answered | LogWanted | SnapshotTaken


class TrainingLanes:
    """`begin` operations; `tell` gets, on the server's thread, what is to be said of them: it must not block."""

    def __init__(self, server: InferenceServer, home: Path, tell: Callable[[list[Told]], None]) -> None:
        self._server = server
        self.home = home
        self._tell = tell
        self._snapshots = Snapshots(home)
        self._models = HeldModels(server, self._leave)
        self._lanes: dict[str, Lane] = {}
        self._told: list[Told] = []
        self._pace = Pace()
        self._num_connections = 0
        self._writer = ThreadPoolExecutor(1, "session-writer")
        server.accompany(self, home)

    def begin(self, key: str, grant: Grant) -> None:
        """Have an operation done: an Answered with this key will tell of it."""
        self._server.do(partial(self._begin, key, grant))

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
        """At once where something can be done or told."""
        return 0.0 if self._told or any(lane.ready() for lane in self._lanes.values()) else None

    def step(self, *, is_shared: bool) -> None:
        """All that is quick, and then one pass of losses."""
        for lane in list(self._lanes.values()):
            while (ready := lane.ready()) and not _is_loss(ready[0]):
                self._apply(lane, ready[0])
        self._do_losses(is_shared=is_shared)
        self._flush()

    def _begin(self, key: str, grant: Grant) -> None:
        assert grant.lane is not None, "a session is a lane"
        assert grant.seq is not None, "and has an order"
        lane = self._lanes.get(grant.lane) or self._lanes.setdefault(grant.lane, Lane(grant.lane))
        if lane.is_beyond(grant.seq):
            lane = self._renew(lane)
        lane.waiting[grant.seq] = Operation(grant.seq, grant.kind, grant.body, key)
        self._look_after(lane)

    def _cancel(self, key: str) -> None:
        for lane in self._lanes.values():
            for operation in [each for each in lane.waiting.values() if each.key == key and not lane.is_blocked]:
                del lane.waiting[operation.seq]
                self._told.append(Answered(key, error=SmeltError("it was cancelled")))

    def _hang_up(self) -> None:
        self._num_connections += 1
        self._told.clear()
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
        if first is None or not self._is_held(lane):
            return
        if lane.applied is None and not lane.is_recalled:
            self._recall(lane, first)
        if lane.has_gap:
            assert lane.applied is not None, "else there is no gap yet"
            lane.asked_before = first
            self._told.append(LogWanted(lane.id, lane.applied, first))

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
        if not self._is_held(lane):
            return
        adapter = _made(base, shape)
        try:
            snapshots[0].read(adapter)
        except CheckpointError as damage:
            log.warning("%s", damage)
            self._restore(lane, snapshots[1:])
            return
        lane.base, lane.shape, lane.adapter = base, shape, adapter
        lane.applied, lane.is_recalled = snapshots[0].seq, False
        self._look_after(lane)

    def _take_log(self, part: LogPart) -> None:
        lane = self._lanes.get(part.lane)
        if lane is None or lane.asked_before is None:
            return
        if part.failure is not None:
            self._lose(lane, error_of(part.failure))
            return
        lane.take_log(part.entries, is_last=part.is_last)

    def _lose(self, lane: Lane, error: Exception) -> None:
        """A lane cannot be brought back: what waits there fails."""
        if not self._is_held(lane):
            return
        for operation in lane.waiting.values():
            assert operation.key is not None, "it was granted"
            self._told.append(Answered(operation.key, error=explained(error, operation.key)))
        self._forget(lane)

    def _is_held(self, lane: Lane) -> bool:
        return self._lanes.get(lane.id) is lane

    def _renew(self, lane: Lane) -> Lane:
        """Begin anew with a lane, whose state is of no use."""
        self._forget(lane)
        again = self._lanes[lane.id] = Lane(lane.id, waiting=lane.waiting)
        for operation in again.waiting.values():
            operation.loss = None
        return again

    def _forget(self, lane: Lane) -> None:
        """Whatever comes of it now finds nobody."""
        del self._lanes[lane.id]
        base, lane.base, lane.applied = lane.base, None, None
        if base is not None and not any(other.base is base for other in self._lanes.values()):
            self._models.release(base.name)

    def _leave(self, base: Base) -> None:
        """Others want a model to be gone. Sessions come back when they are asked for."""
        for lane in [lane for lane in self._lanes.values() if lane.base is base]:
            self._look_after(self._renew(lane))

    # --- Operations ------------------------------------------------------------------------------------------

    def _apply(self, lane: Lane, operation: Operation) -> None:
        """Do one that is no loss, or begin to."""
        if operation.has_failed:
            _void(lane, operation)
            self._advance(lane, operation)
            return
        try:
            self._do(lane, operation)
        except Exception as error:  # noqa: BLE001 - whatever it was, it is this operation's
            self._fail(lane, operation, error)

    def _do(self, lane: Lane, operation: Operation) -> None:
        match operation.kind:
            case "create_model":
                self._create(lane, operation, msgspec.msgpack.decode(operation.body, type=CreateModel))
            case "load_weights":
                self._load(lane, operation, msgspec.msgpack.decode(operation.body, type=LoadWeights))
            case "optim_step":
                step = msgspec.msgpack.decode(operation.body, type=OptimStep)
                settings = OptimSettings(**msgspec.structs.asdict(step))
                self._answer(lane, operation, metrics=_adapter(lane).step(settings))
            case "save_weights":
                saving = msgspec.msgpack.decode(operation.body, type=SaveWeights)
                self._save(lane, operation, saving.folder, TrainedAdapter.save, {"path": saving.path})
            case "save_weights_for_sampler" | "save_weights_external":
                self._save_sampler(lane, operation, msgspec.msgpack.decode(operation.body, type=SaveForSampler))
            case "unload_model":
                self._unload(lane, operation)
            case _:
                raise InvalidInput(f"a session does nothing of the kind {operation.kind!r}")

    def _create(self, lane: Lane, operation: Operation, body: CreateModel) -> None:
        def come(base: Base) -> None:
            if self._is_held(lane):
                lane.is_blocked = False
                try:
                    lane.adapter = _made(base, shape)
                except InvalidInput as error:
                    self._fail(lane, operation, error)
                    return
                lane.base, lane.shape = base, shape
                self._answer(lane, operation, model_id=lane.id)

        shape = Shape(body.base_model, body.rank, body.seed, body.train_attn, body.train_mlp, body.train_unembed)
        lane.is_blocked = True
        self._models.need(shape.base_model, come, partial(self._refuse, lane, operation))

    def _refuse(self, lane: Lane, operation: Operation, error: Exception) -> None:
        if self._is_held(lane):
            lane.is_blocked = False
            self._fail(lane, operation, error)

    def _load(self, lane: Lane, operation: Operation, body: LoadWeights) -> None:
        def come(base: Base) -> None:
            if not self._is_held(lane):
                return
            lane.is_blocked = False
            try:
                shape = lane.shape or shape_of(self.home / body.folder, body.base_model)
                adapter = _made(base, shape)
                adapter.load(self.home / body.folder, with_optimizer=body.with_optimizer)
            except Exception as error:  # noqa: BLE001 - whatever is wrong with the folder
                self._fail(lane, operation, error)
                return
            lane.base, lane.shape, lane.adapter = base, shape, adapter
            if operation.key is None:
                self._advance(lane, operation)
                return
            lane.is_blocked = True
            answer = partial(self._answer, lane, operation, path=body.path, model_id=lane.id)
            self._snapshot(lane, operation.seq, before=answer)

        lane.is_blocked = True
        self._models.need(body.base_model, come, partial(self._refuse, lane, operation))

    def _save_sampler(self, lane: Lane, operation: Operation, body: SaveForSampler) -> None:
        adapter = _adapter(lane)
        if operation.key is not None and body.path is None and lane.base is not None:
            lane.base.text_model.keep_adapter(body.sampler_id, adapter.as_adapter())
        answer = {"path": body.path} if body.path else {"sampling_session_id": body.sampler_id}
        self._save(lane, operation, body.folder, TrainedAdapter.save_weights, answer)

    def _save(
        self,
        lane: Lane,
        operation: Operation,
        folder: str,
        save: Callable[[TrainedAdapter, Path], None],
        answer: dict[str, Any],
    ) -> None:
        """Write a folder, and then answer. What the log has was written before."""
        adapter = _adapter(lane)
        if operation.key is None:
            self._advance(lane, operation)
            return

        def saved(writing: "Future[None]") -> None:
            if self._is_held(lane):
                lane.is_blocked = False
                if error := writing.exception():
                    self._fail(lane, operation, error)
                else:
                    self._answer(lane, operation, **answer)

        lane.is_blocked = True
        self._beside(partial(write_folder, self.home / folder, partial(save, adapter)), saved)

    def _unload(self, lane: Lane, operation: Operation) -> None:
        self._beside(partial(self._snapshots.remove_all, lane.id), lambda _: None)
        self._answer(lane, operation, model_id=lane.id)
        if self._is_held(lane):
            self._forget(lane)

    def _answer(self, lane: Lane, operation: Operation, **answer: Any) -> None:
        if operation.key is not None:
            body = msgspec.json.encode({"type": operation.kind, **answer})
            self._told.append(Answered(operation.key, body))
        self._advance(lane, operation)

    def _fail(self, lane: Lane, operation: Operation, error: BaseException) -> None:
        if operation.key is None:
            self._lose(lane, TrainingError(f"{lane.id} cannot be computed again: seq {operation.seq}: {error}"))
            return
        _void(lane, operation)
        self._told.append(Answered(operation.key, error=explained(error, operation.key)))
        self._advance(lane, operation)

    def _advance(self, lane: Lane, operation: Operation) -> None:
        lane.advance(operation)
        if lane.toll.is_high and lane.adapter is not None and not lane.is_snapshotted and not lane.is_blocked:
            self._snapshot(lane, operation.seq)
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
        if turns:
            losses.compute(base.trainer, turns, self._pace)
        for lane, _ in lines:
            self._end_losses(lane)
            if self._is_held(lane):  # others are first next time
                self._lanes[lane.id] = self._lanes.pop(lane.id)

    def _begin_loss(self, lane: Lane) -> None:
        """Read the first loss of a lane, if it can be."""
        while (ready := lane.ready()) and _is_loss(ready[0]) and ready[0].loss is None:
            try:
                _adapter(lane)
                ready[0].loss = losses.begun(ready[0].body)
            except Exception as error:  # noqa: BLE001 - what is wrong with the request
                self._fail(lane, ready[0], error)

    def _turns(self, lane: Lane) -> Iterator[Turn]:
        """The data of a lane whose turn it is, up to what is no loss."""
        adapter = _adapter(lane)
        for operation in lane.ready():
            if not _is_loss(operation):
                return
            try:
                loss = operation.loss = operation.loss or losses.begun(operation.body)
            except Exception:  # noqa: BLE001 - it fails when it is the first
                return
            while loss.num_begun < len(loss.data):
                loss.num_begun += 1
                yield Turn(lane, operation, loss, loss.data[loss.num_begun - 1], adapter)

    def _end_losses(self, lane: Lane) -> None:
        for operation in lane.ready():
            loss = operation.loss
            if loss is None or not loss.is_over or not self._is_held(lane):
                return
            if loss.error is not None:
                self._fail(lane, operation, loss.error)
                continue
            if operation.key is not None:
                self._told.append(Answered(operation.key, losses.result_of(loss)))
            self._advance(lane, operation)

    # --- Files -----------------------------------------------------------------------------------------------

    def _snapshot(self, lane: Lane, seq: int, before: Callable[[], None] | None = None) -> None:
        """Write the state after a seq beside what goes on; `before` is what waits for it."""
        assert lane.shape is not None, "it is open"
        assert lane.adapter is not None, "it is open"
        connection = self._num_connections
        lane.is_snapshotted, lane.toll = True, Toll()

        def written(writing: "Future[int]") -> None:
            if not self._is_held(lane):
                return
            lane.is_snapshotted = False
            error = writing.exception()
            if error is not None:
                log.error("cannot write a snapshot of %s: %s", lane.id, error)
            if before is not None:
                lane.is_blocked = False
                before()
            if error is None and connection == self._num_connections:
                self._told.append(SnapshotTaken(lane.id, seq, writing.result()))

        state = copy.deepcopy(lane.adapter)
        self._beside(partial(self._snapshots.write, lane.id, seq, lane.shape, state), written)

    def _beside(self, work: Callable[[], T], take: "Callable[[Future[T]], None]") -> None:
        """Do something on the writer's thread, and take what comes of it on the server's."""
        done = self._writer.submit(work)
        done.add_done_callback(lambda done: self._server.do(partial(take, done)))


def _is_loss(operation: Operation) -> bool:
    return operation.kind == "forward_backward" and not operation.has_failed


def _adapter(lane: Lane) -> TrainedAdapter:
    if lane.adapter is None:
        raise InvalidInput(f"{lane.id} was not opened: see what became of opening it")
    return lane.adapter


def _made(base: Base, shape: Shape) -> TrainedAdapter:
    return base.trainer.create(
        rank=shape.rank,
        seed=shape.seed,
        train_attn=shape.train_attn,
        train_mlp=shape.train_mlp,
        train_unembed=shape.train_unembed,
    )


def _void(lane: Lane, operation: Operation) -> None:
    """What an operation that has failed does to the window that it is in."""
    if lane.adapter is None:
        return
    if operation.kind in ("forward_backward", "optim_step"):
        lane.adapter.fail_window()
    if operation.kind == "optim_step":
        with suppress(TrainingError):
            lane.adapter.step(OptimSettings())
