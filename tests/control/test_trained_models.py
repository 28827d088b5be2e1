"""What a run has made is registered under a name, an adapter beside its model, and used by commands and servers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import smelt
from smelt.control.catalogue import Catalogue
from smelt.control.models import import_model, list_models
from smelt.control.trained_models import register_result
from smelt.data.characters import ByteTokenizer
from smelt.errors import AlreadyExists, InvalidInput, NotFound, UnsupportedModel
from smelt.models.decoder import Decoder
from smelt.models.folders import base_of
from smelt.models.loading import convert, load_model
from smelt.models.weights import write_model
from smelt.run_configs import TrainConfig

NAME = "ft:base:greeter:0123456789ab"


@pytest.fixture
def run(home: Path, tmp_path: Path) -> Path:
    """The folder of a run that has fine-tuned the registered model `base` a little."""
    config = TrainConfig(n_layer=1, n_head=2, n_embd=16, block_size=64).decoder_config(257)
    model = Decoder(config)
    model.initialize(0)
    write_model(config, model.state_dict(), home / "models" / "base")
    ByteTokenizer().save(home / "models" / "base")
    return fine_tuned(tmp_path / "out")


def fine_tuned(out_dir: Path, **changes: Any) -> Path:
    data = out_dir.with_suffix(".jsonl")
    data.write_text("".join(json.dumps({"prompt": "Hi", "completion": word}) + "\n" for word in ("ab", "ba")))
    values = {"recipe": "fine-tune", "model": "base", "data": str(data), "out_dir": str(out_dir), "device": "cpu"}
    given = {"learning_rate": 0.1, "epochs": 8, "train_val_split": 0.0, "lora_rank": 2, "dtype": "float32"}
    smelt.train({**values, **given, **changes})
    return out_dir


@pytest.mark.anyio
async def test_an_adapter_is_registered_beside_its_model_and_served_with_it(run: Path, home: Path) -> None:
    folder = register_result(run, NAME, home / "models", job="job-1")
    assert {path.name for path in folder.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "origin.json",
    }
    catalogue = Catalogue(home / "models")
    served = await catalogue.find(NAME)
    assert (served.loaded, served.adapter, served.context) == ("base", f"models/{NAME}", 64)
    assert served.folder == home / "models" / "base"
    assert [each.name for each in await catalogue.all()] == ["base", NAME]
    assert (await catalogue.find(str(home / "models" / "base"))).name == "base"
    assert [(info.name, info.problem) for info in list_models(home / "models")] == [("base", None), (NAME, None)]


def test_registering_twice_changes_nothing_and_another_may_not_have_the_name(run: Path, home: Path) -> None:
    folder = register_result(run, NAME, home / "models", job="job-1")
    before = (folder / "origin.json").read_text()
    assert register_result(run, NAME, home / "models", job="job-1") == folder
    assert (folder / "origin.json").read_text() == before
    with pytest.raises(AlreadyExists):
        register_result(run, NAME, home / "models", job="job-2")


def test_the_adapter_is_in_the_weights_wherever_a_model_is_asked_for(run: Path, home: Path, tmp_path: Path) -> None:
    register_result(run, NAME, home / "models", job="job-1")
    base, _ = load_model(home / "models" / "base")
    tuned, tokenizer = load_model(home / "models" / NAME)
    assert tokenizer is not None
    assert not torch.equal(base.state_dict()["blocks.0.mlp.up.weight"], tuned.state_dict()["blocks.0.mlp.up.weight"])
    convert(home / "models" / NAME, tmp_path / "whole")
    whole, _ = load_model(tmp_path / "whole")
    assert all(torch.equal(tensor, tuned.state_dict()[name]) for name, tensor in whole.state_dict().items())
    texts = [smelt.load(name, dtype="float32").generate("Hi", temperature=0, max_tokens=2) for name in (NAME, str(run))]
    assert texts[0] == texts[1]


def test_all_weights_make_a_model_of_its_own(run: Path, home: Path, tmp_path: Path) -> None:
    register_result(fine_tuned(tmp_path / "whole", lora=False), "whole", home / "models", job="job-2")
    assert (home / "models" / "whole" / "model.safetensors").is_file()
    assert base_of(home / "models" / "whole") == home / "models" / "whole"


def test_an_adapter_whose_model_is_gone_says_so_and_none_is_imported_from_elsewhere(run: Path, home: Path) -> None:
    with pytest.raises(UnsupportedModel, match="is an adapter"):
        import_model((run / "last").resolve(), "stolen", home / "models", "elsewhere")
    register_result(run, NAME, home / "models", job="job-1")
    (home / "models" / "base" / "config.json").unlink()
    with pytest.raises(NotFound, match="is an adapter of the model in"):
        load_model(home / "models" / NAME)
    (info,) = list_models(home / "models")
    assert info.problem is not None
    assert "which is not there" in info.problem


@pytest.mark.anyio
async def test_an_adapter_of_a_model_that_is_not_registered_is_not_served(run: Path, home: Path) -> None:
    folder = register_result(run, NAME, home / "models", job="job-1")
    settings = json.loads((folder / "adapter_config.json").read_text())
    (home / "models" / "base").rename(home / "elsewhere")
    settings["base_model_name_or_path"] = str(home / "elsewhere")
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    assert await Catalogue(home / "models").all() == []


def test_an_adapter_of_a_model_elsewhere_is_refused_with_the_way_to_serve_it(
    run: Path, home: Path, tmp_path: Path
) -> None:
    (home / "models" / "base").rename(tmp_path / "elsewhere")
    out = fine_tuned(tmp_path / "other", model=str(tmp_path / "elsewhere"))
    with pytest.raises(InvalidInput, match=r"not registered.*: smelt models import .*elsewhere MODEL"):
        register_result(out, NAME, home / "models", job="job-1")


def test_a_run_without_a_checkpoint_has_nothing_to_register(home: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="holds no model"):
        register_result(tmp_path, NAME, home / "models", job="job-1")
