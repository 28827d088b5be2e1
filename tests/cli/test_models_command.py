import pickle
import re
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner

from families import random_state, write_nanogpt
from gated import make_key
from holding import holding_server
from live import serving
from smelt.api.app import create_app
from smelt.cli.models import command, fitting, size_text
from smelt.cluster.claims import held_home, note_address
from smelt.configs import DecoderConfig
from smelt.data.characters import ByteTokenizer
from smelt.errors import AlreadyExists, InvalidInput, NotFound, SmeltError, Unavailable
from smelt.library import load
from smelt.models.adapter_folders import Factors, write_adapter
from smelt.models.loading import load_model
from smelt.models.weights import write_model
from smelt.storage.records import all_keys

CONFIG = DecoderConfig(vocab_size=257, block_size=16, n_layer=1, n_head=2, n_embd=8)
NANOGPT = DecoderConfig(vocab_size=3, block_size=16, n_layer=1, n_head=2, n_embd=8, mlp="gelu_exact")


def models(*arguments: str) -> str:
    """What the command prints; its errors are raised."""
    result = CliRunner().invoke(command, arguments, standalone_mode=False, env={"COLUMNS": "200"})
    if result.exception is not None:
        raise result.exception
    return result.output


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """What a run leaves: checkpoints, and links to the best and the last."""
    for step in (1, 2):
        folder = tmp_path / "out" / "checkpoints" / f"step-{step}"
        write_model(CONFIG, random_state(CONFIG, seed=step), folder)
        ByteTokenizer().save(folder)
    (tmp_path / "out" / "best").symlink_to("checkpoints/step-1")
    (tmp_path / "out" / "last").symlink_to("checkpoints/step-2")
    return tmp_path / "out"


def test_a_model_comes_and_goes(home: Path, run_folder: Path) -> None:
    assert "no models yet" in models("ls")
    assert "smelt generate small" in models("import", str(run_folder), "small")
    (row,) = [line.split() for line in models("ls").splitlines() if line.startswith("small")]
    assert row[:4] == ["small", "gpt2", f"{CONFIG.num_parameters:,}", "16"]
    assert row[6:] == ["bytes", str(run_folder / "checkpoints" / "step-1")]
    shown = models("show", "small")
    assert "block_size" in shown
    assert f"{CONFIG.num_parameters:,}" in shown
    models("rm", "small")
    assert "no models yet" in models("ls")


def test_nanogpt_is_converted_on_import_and_on_export(home: Path, tmp_path: Path) -> None:
    write_nanogpt(NANOGPT, random_state(NANOGPT), tmp_path)
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 3, "stoi": {"a": 0, "b": 1, "c": 2}}))
    models("import", str(tmp_path), "letters")
    models("export", str(tmp_path / "ckpt.pt"), str(tmp_path / "exported"))
    for folder in (home / "models" / "letters", tmp_path / "exported"):
        model, tokenizer = load_model(folder)
        assert model.config == NANOGPT
        assert tokenizer is not None
        assert tokenizer.decode([2, 0, 1]) == "cab"


def test_a_run_is_exported_without_what_only_training_needs(home: Path, run_folder: Path, tmp_path: Path) -> None:
    (run_folder / "best" / "optimizer.safetensors").write_bytes(b"")
    models("export", str(run_folder), str(tmp_path / "plain"))
    assert not (tmp_path / "plain" / "optimizer.safetensors").exists()
    assert load_model(tmp_path / "plain")[0].config == CONFIG


def test_a_damaged_model_does_not_hide_the_others(home: Path, run_folder: Path) -> None:
    models("import", str(run_folder), "good")
    models("import", str(run_folder), "bad")
    (home / "models" / "bad" / "model.safetensors").unlink()
    listed = models("ls")
    assert "unusable, see show" in listed
    assert f"{CONFIG.num_parameters:,}" in listed
    assert "has no model.safetensors" in models("show", "bad")


def test_wrong_names_are_refused(home: Path, run_folder: Path) -> None:
    with pytest.raises(InvalidInput, match=r"\.\./x"):
        models("import", str(run_folder), "../x")
    with pytest.raises(NotFound, match="no model or folder 'nowhere'"):
        models("import", "nowhere", "x")
    with pytest.raises(NotFound, match="no registered model"):
        models("rm", str(run_folder))
    models("import", str(run_folder), "small")
    with pytest.raises(AlreadyExists):
        models("import", str(run_folder), "small")


def test_aliases_come_and_go(home: Path, run_folder: Path) -> None:
    models("import", str(run_folder), "small")
    assert "short now means small" in models("alias", "short", "small")
    assert models("alias") == "short -> small\n"
    (row,) = [line.split() for line in models("ls").splitlines() if line.startswith("small")]
    assert row[:3] == ["small", "short", "gpt2"]
    assert "aliases" in models("show", "short")
    assert load("short").config == load("gpt").config == CONFIG
    with pytest.raises(InvalidInput, match="smelt models rm --force small"):
        models("rm", "small")
    models("alias", "--rm", "short")
    assert models("alias") == ""
    models("alias", "short", "small")
    models("rm", "--force", "small")
    assert "no models yet" in models("ls")
    for arguments in (["short"], ["short", "small", "--rm"]):
        with pytest.raises(click.UsageError, match="give a NAME and a TARGET"):
            models("alias", *arguments)


def test_the_memory_that_serving_takes_is_told(home: Path, run_folder: Path) -> None:
    shown = models("show", str(run_folder))
    per_token = 2 * CONFIG.n_embd * 4
    told = f"{size_text(4 * CONFIG.num_parameters)} of weights, {size_text(1000 * per_token)} per 1,000 tokens"
    assert told in re.sub(r"\s+", " ", shown)
    assert "memory, int8" in shown


def test_without_a_server_nothing_can_be_loaded(home: Path, run_folder: Path) -> None:
    models("import", str(run_folder), "small")
    for verb in ("load", "unload"):
        with pytest.raises(Unavailable, match="no server runs in .*; start one: smelt serve"):
            models(verb, "small")
    assert "loaded" not in models("ls")


@pytest.mark.parametrize("has_keys", [False, True], ids=["open", "with keys"])
def test_the_running_server_loads_and_unloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_keys: bool) -> None:
    home = tmp_path / "home"
    monkeypatch.setenv("SMELT_HOME", str(home))
    with holding_server(home) as (services, holding), serving(create_app(services)) as url, held_home(home):
        if has_keys:
            make_key(services)
        note_address(home, url)
        assert "one is loaded by here:1" in models("load", "one")
        assert holding.held == ["one"]
        listed = {line.split()[0]: "yes" in line.split() for line in models("ls").splitlines()}
        assert (listed["one"], listed["two"]) == (True, False)
        assert "one is not loaded" in models("unload", "one")
        with pytest.raises(SmeltError, match="no model 'onn' is served; did you mean one?"):
            models("load", "onn")
        with services.database.connect() as connection:
            assert [key.name for key in all_keys(connection)] == (["laptop"] if has_keys else [])


def test_a_narrow_terminal_loses_what_matters_less() -> None:
    rows = [{"name": "small", "architecture": "gpt2", "size": "1 KiB", "tokenizer": "bytes", "from": "x" * 30}]
    headings = list(rows[0])
    assert fitting(rows, headings, 80) == headings
    assert fitting(rows, headings, 60) == ["name", "architecture", "size", "tokenizer"]
    assert fitting(rows, headings, 20) == ["name", "size"]


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1536, "1.5 KiB"),
        (5 << 20, "5.0 MiB"),
        (3 << 30, "3.0 GiB"),
        (5 << 40, "5120.0 GiB"),
    ],
)
def test_sizes_are_readable(num_bytes: int, text: str) -> None:
    assert size_text(num_bytes) == text


def test_an_adapter_and_its_model_become_one(home: Path, tmp_path: Path) -> None:
    write_model(CONFIG, random_state(CONFIG), tmp_path / "base")
    ByteTokenizer().save(tmp_path / "base")
    factors = {"blocks.0.attention.out": (Factors(torch.ones(2, 8), torch.ones(8, 2), 0.5),)}
    write_adapter(factors, CONFIG, tmp_path / "adapter")
    assert "smelt generate whole" in models("merge", str(tmp_path / "base"), str(tmp_path / "adapter"), "whole")
    plain, _ = load_model(tmp_path / "base")
    whole, tokenizer = load_model(home / "models" / "whole")
    assert tokenizer is not None
    added = whole.state_dict()["blocks.0.attention.out.weight"] - plain.state_dict()["blocks.0.attention.out.weight"]
    torch.testing.assert_close(added, torch.ones(8, 8))
    with pytest.raises(AlreadyExists):
        models("merge", str(tmp_path / "base"), str(tmp_path / "adapter"), "whole")
    with pytest.raises(NotFound):
        models("merge", str(tmp_path / "base"), str(tmp_path / "base"), "other")
    assert "other" not in models("ls")
