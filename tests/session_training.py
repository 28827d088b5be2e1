"""Steps of a session, and what a checkpoint of one must do, for adapters and for whole models alike."""

from collections.abc import Callable
from pathlib import Path

import torch

from smelt.training.session import SessionTrainer, Work
from smelt.training.trained_weights import OptimSettings, TrainedWeights
from training_data import datum_of

STEP = OptimSettings(learning_rate=0.01)


def train(trainer: SessionTrainer, trained: TrainedWeights, steps: range) -> None:
    for number in steps:
        trainer.forward_backward([Work(trained, [datum_of(20, number)], "cross_entropy")])
        trainer.optim_step(trained, STEP)


def check_a_checkpoint_continues(
    trainer: SessionTrainer, whole: TrainedWeights, make_other: Callable[[], TrainedWeights], folder: Path
) -> None:
    """As if nothing had been, with its optimizer; from the same weights, without."""
    train(trainer, whole, range(3))
    whole.save(folder / "c")
    train(trainer, whole, range(3, 6))
    again, fresh = make_other(), make_other()
    again.load(folder / "c", with_optimizer=True)
    fresh.load(folder / "c", with_optimizer=False)
    assert torch.equal(again.masters, fresh.masters)
    for trained in (again, fresh):
        train(trainer, trained, range(3, 6))
    assert torch.equal(again.masters, whole.masters)
    assert not torch.equal(fresh.masters, whole.masters), "its optimizer began anew"
