"""Snapshots on the disk: whole or not there, the newest sound one found, older ones removed."""

from pathlib import Path

import pytest
import torch

from session_worker import load_tiny
from smelt.cluster.snapshots import Shape, Snapshots, shape_of, write_folder
from smelt.errors import CheckpointError
from smelt.training.session import SessionTrainer
from smelt.training.trained_adapter import TrainedAdapter

LANE = "s:train:0"
SHAPE = Shape("tiny", 4, 7, train_mlp=False)


@pytest.fixture
def trainer() -> SessionTrainer:
    return SessionTrainer(load_tiny("tiny").model)


def adapter(trainer: SessionTrainer) -> TrainedAdapter:
    return trainer.create(rank=4, seed=7, train_mlp=False)


def test_the_newest_comes_first_and_two_are_kept(tmp_path: Path, trainer: SessionTrainer) -> None:
    snapshots, state = Snapshots(tmp_path), adapter(trainer)
    state.masters.fill_(0.5)
    assert [snapshots.write(LANE, seq, SHAPE, state.state()) for seq in (3, 9, 12)] == [-1, 3, 9]
    assert [each.seq for each in snapshots.newest_first(LANE, 12)] == [9, 3]
    snapshots.keep_two(LANE, 12)
    found = snapshots.newest_first(LANE, 99)
    assert [each.seq for each in found] == [12, 9]
    assert found[0].shape() == SHAPE
    again = adapter(trainer)
    found[0].read(again)
    assert torch.equal(again.masters, state.masters)
    snapshots.remove_all(LANE)
    assert snapshots.newest_first(LANE, 99) == []


@pytest.mark.parametrize("damage", ["lane.json", "optimizer.safetensors", "session.json"])
def test_a_damaged_one_is_told(tmp_path: Path, trainer: SessionTrainer, damage: str) -> None:
    snapshots = Snapshots(tmp_path)
    snapshots.write(LANE, 3, SHAPE, adapter(trainer).state())
    [snapshot] = snapshots.newest_first(LANE, 4)
    (snapshot.folder / damage).write_bytes(b"{")
    with pytest.raises(CheckpointError):
        _ = snapshot.shape(), snapshot.read(adapter(trainer))


def test_a_folder_is_there_whole_or_as_it_was(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "a").write_text("half")
        raise OSError("full")

    write_folder(tmp_path / "x", lambda folder: (folder / "a").write_text("whole") and None)
    with pytest.raises(OSError, match="full"):
        write_folder(tmp_path / "x", fail)
    assert (tmp_path / "x/a").read_text() == "whole"
    write_folder(tmp_path / "x", lambda folder: (folder / "b").write_text("new") and None)
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["b"]


def test_a_checkpoint_says_what_shape_it_has(tmp_path: Path, trainer: SessionTrainer) -> None:
    adapter(trainer).save(tmp_path / "own")
    assert shape_of(tmp_path / "own", "tiny") == SHAPE
    adapter(trainer).save_weights(tmp_path / "peft")
    assert shape_of(tmp_path / "peft", "tiny") == Shape("tiny", 4, 0)
    trainer.create_whole().save(tmp_path / "whole")
    trainer.create_whole().save_weights(tmp_path / "weights")
    for folder in ("whole", "weights"):
        assert shape_of(tmp_path / folder, "tiny") == Shape("tiny", 0, 0)
