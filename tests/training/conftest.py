import pytest

from smelt.training.session import SessionTrainer
from training_data import make_model


@pytest.fixture(scope="module")
def trainer() -> SessionTrainer:
    return SessionTrainer(make_model())
