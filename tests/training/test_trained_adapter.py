from pathlib import Path

import pytest
import torch

from session_training import STEP, check_a_checkpoint_continues, train
from smelt.errors import CheckpointError, InvalidInput, TrainingError
from smelt.models.adapter_folders import UNEMBEDDING, part_of
from smelt.training.session import SessionTrainer, Work
from smelt.training.trained_weights import OptimSettings
from training_data import datum_of

pytestmark = pytest.mark.usefixtures("computed_by")


def test_a_checkpoint_continues_as_if_nothing_had_been(trainer: SessionTrainer, tmp_path: Path) -> None:
    check_a_checkpoint_continues(
        trainer, trainer.create(rank=4, seed=5), lambda: trainer.create(rank=4, seed=6), tmp_path
    )


def test_a_snapshot_holds_the_gradient_that_waits_and_what_has_failed(trainer: SessionTrainer, tmp_path: Path) -> None:
    adapter, again = trainer.create(rank=4, seed=5), trainer.create(rank=4, seed=6)
    train(trainer, adapter, range(2))
    trainer.forward_backward([Work(adapter, [datum_of(20, 7)], "cross_entropy")])
    adapter.state().write(tmp_path / "s")
    again.read_state(tmp_path / "s")
    for each in (adapter, again):
        trainer.optim_step(each, STEP)
    assert torch.equal(again.masters, adapter.masters)
    assert again.num_steps == adapter.num_steps == 3
    adapter.fail_window()
    adapter.state().write(tmp_path / "failed")
    again.read_state(tmp_path / "failed")
    with pytest.raises(TrainingError):
        trainer.optim_step(again, OptimSettings())


def test_what_belongs_to_another_adapter_is_refused(trainer: SessionTrainer, tmp_path: Path) -> None:
    trainer.create(rank=4, seed=0).save(tmp_path / "c")
    with pytest.raises(CheckpointError, match="rank 4"):
        trainer.create(rank=8, seed=0).load(tmp_path / "c", with_optimizer=True)
    with pytest.raises(CheckpointError, match="does not train"):
        trainer.create(rank=4, seed=0, train_mlp=False).load(tmp_path / "c", with_optimizer=True)
    (tmp_path / "c" / "session.json").write_text("{")
    with pytest.raises(CheckpointError, match="damaged"):
        trainer.create(rank=4, seed=0).load(tmp_path / "c", with_optimizer=True)


def test_only_what_is_asked_for_is_trained(trainer: SessionTrainer) -> None:
    parts = {"train_attn": "attention", "train_mlp": "mlp", "train_unembed": UNEMBEDDING}
    for left_out, part in parts.items():
        trained = {part_of(name) for name in trainer.create(rank=2, seed=0, **{left_out: False}).factors}
        assert trained == set(parts.values()) - {part}
    with pytest.raises(InvalidInput, match="nothing to train"):
        trainer.create(rank=2, seed=0, **dict.fromkeys(parts, False))
    with pytest.raises(InvalidInput, match="rank must be between"):
        trainer.create(rank=0, seed=0)


def test_seeds_decide_how_it_begins(trainer: SessionTrainer) -> None:
    first, same, other = (trainer.create(rank=2, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.masters, same.masters)
    assert not torch.equal(first.masters, other.masters)
    assert all(not bool(b.any()) for pairs in first.factors.values() for _, b in pairs)
