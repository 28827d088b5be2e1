"""Adapters from a terminal: they come from PEFT's folders, write, and go."""

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from families import random_state
from smelt.cli.adapters import command
from smelt.configs import DecoderConfig
from smelt.control.catalogue import Catalogue
from smelt.data.characters import ByteTokenizer
from smelt.errors import AlreadyExists, InvalidInput, NotFound, UnsupportedModel
from smelt.library import load
from smelt.models.adapter_folders import Factors, write_adapter
from smelt.models.weights import write_model

CONFIG = DecoderConfig(vocab_size=257, block_size=16, n_layer=1, n_head=2, n_embd=8)
WIDER = DecoderConfig(vocab_size=257, block_size=16, n_layer=1, n_head=2, n_embd=16)


def adapters(*arguments: str) -> str:
    result = CliRunner().invoke(command, arguments, standalone_mode=False, env={"COLUMNS": "200"})
    if result.exception is not None:
        raise result.exception
    return result.output


def write_base(folder: Path, config: DecoderConfig = CONFIG) -> Path:
    write_model(config, random_state(config), folder)
    ByteTokenizer().save(folder)
    return folder


@pytest.fixture
def peft(tmp_path: Path) -> Path:
    factors = {"blocks.0.attention.out": (Factors(torch.ones(2, 8), torch.ones(8, 2), 0.5),)}
    write_adapter(factors, CONFIG, tmp_path / "peft")
    return tmp_path / "peft"


@pytest.mark.anyio
async def test_an_adapter_comes_is_served_and_goes(home: Path, peft: Path) -> None:
    write_base(home / "models" / "base")
    assert "no adapters yet" in adapters("ls")
    assert "smelt generate polite" in adapters("import", str(peft), "polite", "--model", "base")
    listed = adapters("ls").splitlines()
    assert listed[0].split() == ["name", "model", "rank", "size", "from"]
    assert listed[1].split()[:3] == ["polite", "base", "2"]
    served = await Catalogue(home / "models").find("polite")
    assert (served.base, served.adapter) == ("base", "models/polite")
    found = load("polite", dtype="float32").model.state_dict()["blocks.0.attention.out.weight"]
    plain = load("base", dtype="float32").model.state_dict()["blocks.0.attention.out.weight"]
    torch.testing.assert_close(found - plain, torch.ones(8, 8))
    adapters("rm", "polite")
    assert "no adapters yet" in adapters("ls")
    assert (home / "models" / "base").is_dir()


def test_what_cannot_be_registered_is_refused(home: Path, peft: Path, tmp_path: Path) -> None:
    base = write_base(home / "models" / "base")
    write_base(home / "models" / "wider", WIDER)
    for arguments, error in (
        ((str(peft), "polite", "--model", "gone"), NotFound),
        ((str(peft), "polite", "--model", "wider"), UnsupportedModel),
        ((str(base), "polite", "--model", "base"), NotFound),
        ((str(tmp_path / "gone"), "polite", "--model", "base"), NotFound),
        ((str(peft), "base", "--model", "base"), AlreadyExists),
        ((str(peft), "../polite", "--model", "base"), InvalidInput),
    ):
        with pytest.raises(error):
            adapters("import", *arguments)
    adapters("import", str(peft), "polite", "--model", "base")
    with pytest.raises(InvalidInput, match="is an adapter itself"):
        adapters("import", str(peft), "other", "--model", "polite")
    with pytest.raises(InvalidInput, match="is a model and no adapter"):
        adapters("rm", "base")
    with pytest.raises(NotFound):
        adapters("rm", "gone")
