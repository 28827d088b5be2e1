"""What each operation of a session does, but for losses; knows no order and no connection.

Some wait for a model to come or for files to be written: their lane is blocked until then.
"""

from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import msgspec

from smelt.cluster.held_models import HeldModels
from smelt.cluster.lanes import Base, Lane, Operation
from smelt.cluster.snapshots import Shape, shape_of, write_folder
from smelt.control.models import job_of, new_model
from smelt.errors import InvalidInput, Unavailable
from smelt.models.merging import write_merged
from smelt.storage.faults import Fault
from smelt.training.trained_adapter import TrainedAdapter
from smelt.training.trained_model import TrainedModel
from smelt.training.trained_weights import OptimSettings
from smelt.transport.operations import (
    CreateModel,
    LoadWeights,
    MergeWeights,
    OptimStep,
    SaveForSampler,
    SaveWeights,
)


class Host(Protocol):
    """Who keeps the lanes, and is told what comes of their operations."""

    @property
    def fault(self) -> Fault: ...
    def is_held(self, lane: Lane) -> bool: ...
    def answer(self, lane: Lane, operation: Operation, **answer: Any) -> None: ...
    def fail(self, lane: Lane, operation: Operation, error: BaseException) -> None: ...
    def advance(self, lane: Lane, operation: Operation) -> None: ...
    def snapshot(self, lane: Lane, seq: int, then: Callable[[BaseException | None], None]) -> None: ...
    def renew(self, lane: Lane) -> object: ...
    def beside(self, work: Callable[[], None], take: "Callable[[Future[None]], None]") -> None: ...
    def unload(self, lane: Lane) -> None: ...


class SessionOperations:
    """`do` them, one after the other, on the thread of the lanes."""

    def __init__(self, host: Host, home: Path, models: HeldModels) -> None:
        self._host = host
        self._home = home
        self._models = models

    def do(self, lane: Lane, operation: Operation) -> None:
        """Do one that is no loss, or begin to. Raises what is wrong with it."""
        match operation.kind:
            case "create_model":
                self._create(lane, operation, msgspec.msgpack.decode(operation.body, type=CreateModel))
            case "load_weights":
                self._load(lane, operation, msgspec.msgpack.decode(operation.body, type=LoadWeights))
            case "optim_step":
                step = msgspec.msgpack.decode(operation.body, type=OptimStep)
                settings = OptimSettings(**msgspec.structs.asdict(step))
                self._host.answer(lane, operation, metrics=trained_of(lane).step(settings))
            case "save_weights":
                saving = msgspec.msgpack.decode(operation.body, type=SaveWeights)
                self._save(lane, operation, saving.folder, trained_of(lane).save, {"path": saving.path})
            case "save_weights_for_sampler" | "save_weights_external":
                self._save_sampler(lane, operation, msgspec.msgpack.decode(operation.body, type=SaveForSampler))
            case "merge_weights":
                self._merge(lane, operation, msgspec.msgpack.decode(operation.body, type=MergeWeights))
            case "unload_model":
                self._unload(lane, operation)
            case _:
                raise InvalidInput(f"a session does nothing of the kind {operation.kind!r}")

    def _create(self, lane: Lane, operation: Operation, body: CreateModel) -> None:
        def come(base: Base) -> None:
            if self._host.is_held(lane):
                lane.is_blocked = False
                try:
                    lane.trained = made(base, shape)
                except Exception as error:  # noqa: BLE001 - a shape that cannot be, or no memory for it
                    self._host.fail(lane, operation, error)
                    return
                lane.base, lane.shape = base, shape
                self._host.answer(lane, operation, model_id=lane.id)

        shape = Shape(body.base_model, body.rank, body.seed, body.train_attn, body.train_mlp, body.train_unembed)
        lane.is_blocked = True
        self._models.need(shape.base_model, come, partial(self._refuse, lane, operation))

    def _refuse(self, lane: Lane, operation: Operation, error: Exception) -> None:
        if self._host.is_held(lane):
            lane.is_blocked = False
            self._host.fail(lane, operation, error)

    def _load(self, lane: Lane, operation: Operation, body: LoadWeights) -> None:
        def come(base: Base) -> None:
            if not self._host.is_held(lane):
                return
            lane.is_blocked = False
            try:
                shape = lane.shape or shape_of(self._home / body.folder, body.base_model)
                trained = made(base, shape)
                trained.load(self._home / body.folder, with_optimizer=body.with_optimizer)
            except Exception as error:  # noqa: BLE001 - whatever is wrong with the folder
                self._host.fail(lane, operation, error)
                return
            lane.base, lane.shape, lane.trained = base, shape, trained
            if operation.key is None:
                self._host.advance(lane, operation)
                return
            lane.is_blocked = True
            self._host.snapshot(lane, operation.seq, then=kept)

        def kept(error: BaseException | None) -> None:
            if error is None:
                self._host.answer(lane, operation, path=body.path, model_id=lane.id)
            else:
                self._host.fail(lane, operation, error)
                self._host.renew(lane)  # what was loaded counts for nothing

        lane.is_blocked = True
        self._models.need(body.base_model, come, partial(self._refuse, lane, operation))

    def _save_sampler(self, lane: Lane, operation: Operation, body: SaveForSampler) -> None:
        trained, base = trained_of(lane), lane.base
        assert base is not None, "it is open"

        def save(folder: Path) -> None:
            trained.save_weights(folder)
            if isinstance(trained, TrainedModel):  # which then is a model like any other
                base.text_model.tokenizer.save(folder)

        if operation.key is not None and body.path is None and isinstance(trained, TrainedAdapter):
            with suppress(Unavailable):  # then it is read when it has its turn
                base.text_model.keep_adapter(body.sampler_id, trained.as_adapter())
        answer = {"path": body.path} if body.path else {"sampling_session_id": body.sampler_id}
        self._save(lane, operation, body.folder, save, answer)

    def _merge(self, lane: Lane, operation: Operation, body: MergeWeights) -> None:
        trained, models_folder, job = trained_of(lane), self._home / body.models_folder, lane.id
        assert lane.base is not None, "it is open"
        if not isinstance(trained, TrainedAdapter):
            raise InvalidInput(f"{lane.id} trains all weights: what it saves for a sampler is a model already")
        adapter = trained.as_adapter()
        base = lane.base.text_model

        def write() -> None:
            if job_of(body.name, models_folder) != f"{job}:{operation.seq}":  # else its worker died before it said so
                with new_model(body.name, models_folder, f"adapter {job}", f"{job}:{operation.seq}") as folder:
                    write_merged(base.model, base.tokenizer, base.chat_format, adapter, folder)

        self._write(lane, operation, write, {"model": body.name})

    def _save(
        self,
        lane: Lane,
        operation: Operation,
        folder: str,
        save: Callable[[Path], None],
        answer: dict[str, Any],
    ) -> None:
        """Write a folder, and then answer."""

        def fill(path: Path) -> None:
            save(path)
            self._host.fault("mid_save")

        def write() -> None:
            write_folder(self._home / folder, fill)
            self._host.fault("after_save")

        self._write(lane, operation, write, answer)

    def _write(self, lane: Lane, operation: Operation, write: Callable[[], None], answer: dict[str, Any]) -> None:
        """Write files, and then answer. What the log has was written before."""
        if operation.key is None:
            self._host.advance(lane, operation)
            return

        def written(writing: "Future[None]") -> None:
            if self._host.is_held(lane):
                lane.is_blocked = False
                if error := writing.exception():
                    self._host.fail(lane, operation, error)
                else:
                    self._host.answer(lane, operation, **answer)

        lane.is_blocked = True
        self._host.beside(write, written)

    def _unload(self, lane: Lane, operation: Operation) -> None:
        self._host.answer(lane, operation, model_id=lane.id)
        self._host.unload(lane)


def trained_of(lane: Lane) -> TrainedAdapter | TrainedModel:
    """What a session trains. InvalidInput where it was never opened."""
    if lane.trained is None:
        raise InvalidInput(f"{lane.id} was not opened: see what became of opening it")
    return lane.trained


def made(base: Base, shape: Shape) -> TrainedAdapter | TrainedModel:
    """A new adapter, or a copy of all weights. InvalidInput for a shape that cannot be, or where memory is short."""
    if shape.rank == 0:
        return base.trainer.create_whole()
    return base.trainer.create(
        rank=shape.rank,
        seed=shape.seed,
        train_attn=shape.train_attn,
        train_mlp=shape.train_mlp,
        train_unembed=shape.train_unembed,
    )
