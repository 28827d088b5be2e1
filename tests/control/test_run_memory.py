"""Runs that cannot fit are refused with the figures and what fits; those of a GPU and of unknown shape are not."""

import json
from pathlib import Path

import pytest

from families import random_state
from smelt.configs import DecoderConfig
from smelt.control import run_memory
from smelt.control.run_memory import check_memory, wait_for_memory
from smelt.data.preparation import prepare
from smelt.errors import InvalidInput, Unavailable
from smelt.models.weights import write_model
from smelt.run_configs import RunConfig, config_of
from smelt.settings import Settings, load_settings

GIB = 2**30
LARGE = {"n_layer": 12, "n_embd": 768, "n_head": 12, "block_size": 256, "batch_size": 64, "dtype": "float32"}


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return load_settings(home=tmp_path / "home")


def set_memory(monkeypatch: pytest.MonkeyPatch, num_bytes: int) -> None:
    monkeypatch.setattr(run_memory, "host_bytes", lambda: num_bytes)


def pretraining(**values: object) -> RunConfig:
    return config_of({"data_path": "builtin:pydoc", **LARGE, **values})


def test_a_run_that_cannot_fit_is_told_what_does(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    config = pretraining()
    set_memory(monkeypatch, 64 * GIB)
    check_memory(config, settings, "cpu")
    set_memory(monkeypatch, 8 * GIB)
    with pytest.raises(InvalidInput) as refusal:
        check_memory(config, settings, "cpu")
    said = str(refusal.value)
    assert "needs about 14.8 GiB (weights 0.3, gradients 0.3, moments 0.7, activations 12.1" in said
    assert "there are 7.2 GiB; it fits, in" in said
    words = dict(part.split("=") for part in said.partition(" steps, with ")[2].split(", "))
    assert int(words["batch_size"]) * int(words["gradient_accumulation_steps"]) == 64
    check_memory(pretraining(**words), settings, "cpu")
    check_memory(config, settings, "cuda:0")


def test_weights_alone_can_be_too_many(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    set_memory(monkeypatch, GIB)
    with pytest.raises(InvalidInput, match="choose a smaller model"):
        check_memory(pretraining(), settings, "cpu")


def test_ranks_share_the_memory(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"n_layer": 1, "n_embd": 64, "n_head": 1, "tokenizer": "bytes"}
    set_memory(monkeypatch, GIB)
    check_memory(config_of({"data_path": "builtin:pydoc", **config}), settings, "cpu")
    with pytest.raises(InvalidInput, match="for each of 4 ranks"):
        check_memory(config_of({"data_path": "builtin:pydoc", **config, "ranks": 4}), settings, "cpu")


def test_ranks_that_cannot_hold_copies_are_told_to_hold_parts(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = {"n_layer": 48, "n_embd": 2048, "n_head": 16, "block_size": 64, "batch_size": 4, "ranks": 4}
    set_memory(monkeypatch, 140 * GIB)
    with pytest.raises(InvalidInput, match=r"for each of 4 ranks; it fits, .*sharding=(optimizer|full)") as refusal:
        check_memory(pretraining(**deep), settings, "cpu")
    words = dict(part.split("=") for part in str(refusal.value).partition(" steps, with ")[2].split(", "))
    check_memory(pretraining(**{**deep, **words}), settings, "cpu")


def test_the_shape_is_the_models_and_the_vocabulary_the_datasets(settings: Settings) -> None:
    shape = DecoderConfig(vocab_size=257, block_size=64, n_layer=1, n_head=2, n_embd=8)
    write_model(shape, random_state(shape), settings.models / "tiny")
    prepare("builtin:pydoc", settings.datasets, "docs", tokenizer="bytes")
    tuned = run_memory.workload(config_of({"recipe": "fine-tune", "model": "tiny", "data": "x"}), settings)
    assert tuned is not None
    assert (tuned.shape.vocab_size, tuned.block_size) == (257, 64)
    assert 0 < (tuned.num_trained or 0) < shape.num_parameters
    (settings.models / "of-tiny").mkdir()
    told = {"base_model_name_or_path": str(settings.models / "tiny"), "r": 32}
    (settings.models / "of-tiny" / "adapter_config.json").write_text(json.dumps(told))
    further = run_memory.workload(config_of({"recipe": "fine-tune", "model": "of-tiny", "data": "x"}), settings)
    assert further is not None
    assert (further.shape, further.num_trained) == (tuned.shape, 2 * (tuned.num_trained or 0))
    scratch = run_memory.workload(config_of({"dataset": "docs"}), settings)
    assert scratch is not None
    assert (scratch.shape.vocab_size, scratch.block_size, scratch.num_trained) == (257, 128, None)
    assert run_memory.workload(config_of({"recipe": "classify", "data": "x"}), settings) is None


def test_a_run_waits_until_others_have_given_memory_back(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    free, told = [GIB, GIB, 100 * GIB], []
    monkeypatch.setattr(run_memory, "free_host_bytes", lambda: free.pop(0) if len(free) > 1 else free[0])
    monkeypatch.setattr(run_memory, "LOOK_SECONDS", 0.001)
    wait_for_memory(pretraining(), settings, "cpu", told.append)
    assert told == ["it waits for memory: it needs about 14.8 GiB, and 1.0 GiB are free"]
    free[:] = [GIB]
    with pytest.raises(Unavailable, match="then resume the run"):
        wait_for_memory(pretraining(), settings, "cpu", told.append, patience_s=0.0)
    wait_for_memory(pretraining(), settings, "cuda:0", told.append)
    resumed = pretraining(init_from="resume", out_dir=str(settings.runs / "none"))
    wait_for_memory(resumed, settings, "cpu", told.append)
    assert len(told) == 1
