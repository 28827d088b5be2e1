"""Which models a worker loads: registered ones and what sessions have made of them, no other folder."""

from pathlib import Path

import pytest

from session_worker import load_tiny
from smelt.cluster.worker import Shelf
from smelt.errors import NotFound
from smelt.models.weights import write_model
from smelt.settings import Settings, load_settings


def write_tiny(folder: Path) -> None:
    tiny = load_tiny("tiny")
    write_model(tiny.config, tiny.model.state_dict(), folder)
    tiny.tokenizer.save(folder)


@pytest.fixture
def settings(home: Path) -> Settings:
    write_tiny(home / "models" / "tiny")
    write_tiny(home / "sessions" / "s_train_0" / "sampler_weights" / "a")
    write_tiny(home / "elsewhere")
    (home / "sessions" / "s_train_0" / "ephemeral" / "adapter").mkdir(parents=True)
    (home / "sessions" / "s_train_0" / "ephemeral" / "adapter" / "adapter_config.json").write_text("{}")
    return load_settings(device="cpu")


def test_registered_models_and_those_of_sessions_are_there(settings: Settings) -> None:
    shelf = Shelf(settings, None)
    own = "sessions/s_train_0/sampler_weights/a"
    assert shelf.load("tiny").config == shelf.load(own).config
    assert shelf.examine(own).num_bytes > 0


@pytest.mark.parametrize(
    "name",
    [
        "elsewhere",
        "sessions/../elsewhere",
        "sessions/../../etc",
        "sessions/s_train_0/ephemeral/adapter",
        "sessions/none",
        "/etc",
    ],
)
def test_no_other_folder_is_anybodys_to_ask_for(settings: Settings, name: str) -> None:
    with pytest.raises(NotFound, match="registered: tiny"):
        Shelf(settings, None).load(name)


def test_a_setting_has_sessions_keep_fewer_activations(settings: Settings) -> None:
    assert not Shelf(settings, None).load("tiny").model.gradient_checkpointing
    saving = Shelf(load_settings(device="cpu", gradient_checkpointing=True), None)
    assert saving.load("tiny").model.gradient_checkpointing
