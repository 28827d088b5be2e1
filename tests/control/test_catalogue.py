"""What is served under which name, and that finding it costs nothing while nothing changes."""

import asyncio
import json
import shutil
from pathlib import Path

import pytest

from families import random_state
from smelt.configs import DecoderConfig
from smelt.control import catalogue as module
from smelt.control.catalogue import Catalogue, forget_choice
from smelt.control.models import import_model, remove_model, set_alias
from smelt.data.characters import ByteTokenizer
from smelt.errors import UnknownModel
from smelt.models.weights import write_model

pytestmark = pytest.mark.anyio

CONFIG = DecoderConfig(vocab_size=257, block_size=16, n_layer=1, n_head=2, n_embd=8)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    write_model(CONFIG, random_state(CONFIG), folder)
    ByteTokenizer().save(folder)
    return folder


@pytest.fixture
def models(tmp_path: Path) -> Path:
    return tmp_path / "models"


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the models whose files were read."""
    names: list[str] = []
    show = module.show_model

    def noting(name: str, models_folder: Path) -> object:
        names.append(name)
        return show(name, models_folder)

    monkeypatch.setattr(module, "show_model", noting)
    return names


async def names(catalogue: Catalogue) -> list[str]:
    return [served.name for served in await catalogue.all()]


async def test_registered_models_come_and_go(source: Path, models: Path) -> None:
    catalogue = Catalogue(models)
    assert await names(catalogue) == []
    with pytest.raises(UnknownModel, match="none yet"):
        await catalogue.find("small")
    import_model(source, "small", models, origin="x")
    assert (await catalogue.find("small")).context == 16
    assert await names(catalogue) == ["small"]
    remove_model("small", models)
    assert await names(catalogue) == []
    with pytest.raises(UnknownModel):
        await catalogue.find("small")


async def test_files_are_read_once_until_they_change(source: Path, models: Path, reads: list[str]) -> None:
    for name in ("a", "b"):
        import_model(source, name, models, origin="x")
    catalogue = Catalogue(models)
    for _ in range(3):
        await asyncio.gather(*[catalogue.all() for _ in range(5)], catalogue.find("a"))
    assert sorted(reads) == ["a", "b"]
    (models / "b" / "config.json").write_text(json.dumps(json.loads((source / "config.json").read_text())))
    await catalogue.all()
    assert sorted(reads) == ["a", "b", "b"]


async def test_a_model_that_is_known_is_found_without_looking(
    source: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import_model(source, "small", models, origin="x")
    catalogue = Catalogue(models)
    await catalogue.find("small")
    shutil.rmtree(models)
    assert (await catalogue.find("small")).name == "small"
    monkeypatch.setattr(module, "FRESH_SECONDS", 0.0)
    with pytest.raises(UnknownModel):
        await catalogue.find("small")


async def test_a_damaged_model_is_not_served_until_it_is_whole(source: Path, models: Path) -> None:
    weights = import_model(source, "small", models, origin="x") / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:100])
    catalogue = Catalogue(models)
    assert await names(catalogue) == []
    with pytest.raises(UnknownModel, match="damaged"):
        await catalogue.find("small")
    weights.write_bytes(whole)
    assert (await catalogue.find("small")).name == "small"


async def test_a_model_without_a_tokenizer_writes_no_text(source: Path, models: Path) -> None:
    folder = import_model(source, "small", models, origin="x")
    for path in folder.glob("*tokenizer*"):
        path.unlink()
    assert await names(Catalogue(models)) == []


async def test_a_served_folder_has_its_own_name_and_an_alias(
    source: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import_model(source, "small", models, origin="x")
    monkeypatch.chdir(source.parent)
    for given in (str(source), "source", "./source/", "source/../source"):
        catalogue = Catalogue(models, given)
        assert await names(catalogue) == ["source", "small"]
        assert await catalogue.find("default") == await catalogue.find("source")
    assert (await catalogue.find("source")).context == 16


async def test_the_default_may_be_registered_or_on_the_hub(source: Path, models: Path) -> None:
    for name in ("a", "b"):
        import_model(source, name, models, origin="x")
    catalogue = Catalogue(models, "b")
    assert await names(catalogue) == ["b", "a"]
    assert (await catalogue.find("default")).name == "b"
    assert (await Catalogue(models, "hf:org/name").find("default")).name == "name"
    assert (await Catalogue(models, "gpt2").find("gpt2")).context is None


async def test_the_served_folder_wins_over_a_registered_model_of_its_name(source: Path, models: Path) -> None:
    import_model(source, "source", models, origin="x")
    import_model(source, "default", models, origin="x")
    longer = source.with_name("other") / "source"
    config = CONFIG.model_copy(update={"block_size": 32})
    write_model(config, random_state(config), longer)
    catalogue = Catalogue(models, str(longer))
    assert await names(catalogue) == ["source", "default"]
    assert (await catalogue.find("source")).context == 32
    assert (await catalogue.find("default")).name == "default"


async def aliases(catalogue: Catalogue) -> dict[str, str]:
    return {alias: served.name for alias, served in (await catalogue.aliases()).items()}


async def test_an_alias_finds_its_model_and_is_seen_within_a_second(
    source: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b-1"):
        import_model(source, name, models, origin="x")
    catalogue = Catalogue(models)
    with pytest.raises(UnknownModel):
        await catalogue.find("short")
    set_alias("short", "a", models)
    assert (await catalogue.find("short")).name == "a"
    assert (await catalogue.find("b_1")).name == "b-1"
    set_alias("short", "b-1", models)
    monkeypatch.setattr(module, "FRESH_SECONDS", 0.0)
    assert (await catalogue.find("short")).name == "b-1"
    assert await names(catalogue) == ["a", "b-1"]
    assert await aliases(catalogue) == {"short": "b-1"}


async def test_the_default_model_has_two_more_names(
    source: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FRESH_SECONDS", 0.0)
    import_model(source, "a", models, origin="x")
    catalogue = Catalogue(models)
    assert await aliases(catalogue) == {"gpt": "a", "default": "a"}  # the only one
    import_model(source, "b", models, origin="x")
    assert await aliases(catalogue) == {}
    with pytest.raises(UnknownModel, match="no default model; choose it: smelt models alias default NAME"):
        await catalogue.find("gpt")
    set_alias("default", "b", models)
    assert await aliases(catalogue) == {"gpt": "b", "default": "b"}
    assert (await Catalogue(models, "a").find("gpt")).name == "a"  # what the server was given comes first


async def test_a_chosen_default_outlives_the_process_but_not_the_server(source: Path, models: Path) -> None:
    for name in ("a", "b", "c"):
        import_model(source, name, models, origin="x")
    set_alias("short", "b", models)
    catalogue = Catalogue(models, "a")
    assert (await catalogue.choose("short")).name == "b"
    for after in (catalogue, Catalogue(models, "a")):
        assert (await after.find("gpt")).name == (await after.find("default")).name == "b"
    with pytest.raises(UnknownModel):
        await catalogue.choose("nothing")
    remove_model("b", models, force=True)
    with pytest.raises(UnknownModel):  # never in silence another one
        await Catalogue(models, "a").find("gpt")
    forget_choice(models)
    assert (await Catalogue(models, "a").find("gpt")).name == "a"


async def test_damaged_aliases_take_no_model_away(source: Path, models: Path) -> None:
    import_model(source, "a", models, origin="x")
    set_alias("short", "a", models)
    catalogue = Catalogue(models)
    await catalogue.find("short")
    (models / "aliases.json").write_text("{")
    assert await names(catalogue) == ["a"]
    assert (await catalogue.find("short")).name == "a"


async def test_an_unknown_model_says_what_is_near(source: Path, models: Path) -> None:
    import_model(source, "shakespeare", models, origin="x")
    set_alias("bard", "shakespeare", models)
    for asked, near in (("shakespear", "shakespeare"), ("bart", "bard")):
        with pytest.raises(UnknownModel, match=rf"did you mean {near}\? there are: shakespeare"):
            await Catalogue(models).find(asked)


async def test_a_run_that_has_saved_nothing_is_served_once_it_has(source: Path, models: Path) -> None:
    run = source.with_name("run")
    run.mkdir()
    catalogue = Catalogue(models, str(run))
    assert await names(catalogue) == []
    shutil.copytree(source, run / "best")
    assert (await catalogue.find("run")).context == 16


async def test_names_with_an_owner_are_served(source: Path, models: Path) -> None:
    name = "Qwen/Qwen3-8B-Base"
    import_model(source, name, models, origin="x")
    set_alias("meta-llama/Llama-3.2-1B", name, models)
    for catalogue in (Catalogue(models), Catalogue(models, name)):
        assert await names(catalogue) == [name]
        for wanted in (name, "meta-llama/Llama-3.2-1B", "default", str(models / name)):
            assert (await catalogue.find(wanted)).name == name
        for wanted in ("Qwen3-8B-Base", "Qwen", "Qwen/../Qwen/Qwen3-8B-Base"):
            with pytest.raises(UnknownModel):
                await catalogue.find(wanted)
