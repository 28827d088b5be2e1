"""Snapshots of sessions on the disk: written whole or not at all, found, read, removed; knows no requests and no log.

sessions/LANE/snapshots/SEQ     all that the operation behind SEQ depends on
"""

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from smelt.disk import sync
from smelt.errors import CheckpointError, NotFound
from smelt.models.adapter_folders import UNEMBEDDING, part_of
from smelt.models.folders import ADAPTER_FILE, adapts_unembedding, is_adapter, read_config, read_json
from smelt.storage.faults import Fault, no_fault
from smelt.training.trained_weights import State, TrainedWeights, facts_of

FACTS_FILE = "lane.json"

log = logging.getLogger(__name__)


class Shape(msgspec.Struct, frozen=True):
    """What a session's weights are made with: an adapter of that rank, or with rank 0 all of the model's."""

    base_model: str
    rank: int
    seed: int
    train_attn: bool = True
    train_mlp: bool = True
    train_unembed: bool = True


def shape_of(folder: Path, base_model: str) -> Shape:
    """Of what a folder holds: a checkpoint of ours, any adapter of PEFT's, or a whole model's weights.

    NotFound, CheckpointError.
    """
    try:
        facts = facts_of(folder)
    except NotFound:
        if not is_adapter(folder):
            read_config(folder)  # which says if there is no model either
            return Shape(base_model, rank=0, seed=0)
        settings = read_json(folder / ADAPTER_FILE)
        return Shape(base_model, int(settings["r"]), seed=0, train_unembed=adapts_unembedding(settings))
    parts = {part_of(name) for name in facts["matrices"]} if facts["rank"] else {"attention", "mlp", UNEMBEDDING}
    trained = ("attention" in parts, "mlp" in parts, UNEMBEDDING in parts)
    return Shape(base_model, int(facts["rank"]), int(facts["seed"]), *trained)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One that is there."""

    seq: int
    folder: Path

    def shape(self) -> Shape:
        """Of what to `read` it into. CheckpointError where it is damaged."""
        try:
            return msgspec.json.decode((self.folder / FACTS_FILE).read_bytes(), type=Shape)
        except (OSError, msgspec.DecodeError) as error:
            raise CheckpointError(f"{self.folder} is damaged: {error}") from None

    def read(self, trained: TrainedWeights) -> None:
        """Set what a session trains to this state. CheckpointError where it is damaged."""
        try:
            trained.read_state(self.folder)
        except (NotFound, KeyError, json.JSONDecodeError) as error:
            raise CheckpointError(f"{self.folder} is damaged: {error}") from None


class Snapshots:
    """Of all lanes, below the home folder."""

    def __init__(self, home: Path, fault: Fault = no_fault) -> None:
        self._home = home
        self._fault = fault

    def newest_first(self, lane: str, before: int) -> list[Snapshot]:
        """A lane's snapshots of seqs below `before`."""
        folder = self._folder(lane)
        seqs = [int(path.name) for path in folder.iterdir() if path.name.isdecimal()] if folder.is_dir() else []
        return [Snapshot(seq, folder / str(seq)) for seq in sorted(seqs, reverse=True) if seq < before]

    def write(self, lane: str, seq: int, shape: Shape, state: State) -> int:
        """Write one; the seq of the one before, or -1."""

        def fill(folder: Path) -> None:
            state.write(folder)
            (folder / FACTS_FILE).write_bytes(msgspec.json.encode(shape))
            self._fault("mid_snapshot")

        earlier = self.newest_first(lane, seq)
        write_folder(self._folder(lane) / str(seq), fill)
        self._fault("after_snapshot")
        return earlier[0].seq if earlier else -1

    def keep_two(self, lane: str, seq: int) -> None:
        """Remove what is older than the snapshot before that seq."""
        self._fault("before_old_snapshots_go")
        for old in self.newest_first(lane, seq)[1:]:
            shutil.rmtree(old.folder, ignore_errors=True)

    def remove_all(self, lane: str) -> None:
        """Of a session that is over."""
        shutil.rmtree(self._folder(lane), ignore_errors=True)

    def _folder(self, lane: str) -> Path:
        return self._home / "sessions" / lane.replace(":", "_") / "snapshots"


def write_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """A folder that is there whole or not at all, even if the power goes; what was there under its name is gone."""
    temporary = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    fill(temporary)
    for path in (*temporary.iterdir(), temporary):
        sync(path)
    if folder.exists():
        old = folder.with_name(f"{folder.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
        temporary.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    else:
        temporary.rename(folder)
    sync(folder.parent)
