import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from classifiers import LABELS, save_small_classifier
from families import random_state
from smelt import disk
from smelt.configs import DecoderConfig
from smelt.control import model_files
from smelt.control.models import (
    export_model,
    import_model,
    job_of,
    list_models,
    new_model,
    remove_alias,
    remove_model,
    set_alias,
    show_model,
)
from smelt.data.characters import ByteTokenizer
from smelt.errors import AlreadyExists, InvalidInput, NotFound, OutOfSpace, UnsafeFile, UnsupportedModel
from smelt.models.aliases import read_aliases
from smelt.models.classifier_folders import read_classifier
from smelt.models.weights import read_model, write_model

CONFIG = DecoderConfig(vocab_size=257, block_size=16, n_layer=1, n_head=2, n_embd=8)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    write_model(CONFIG, random_state(CONFIG), folder)
    ByteTokenizer().save(folder)
    return folder


@pytest.fixture
def registry(tmp_path: Path) -> Path:
    return tmp_path / "home" / "models"


def test_an_imported_model_is_listed_shown_and_the_same(source: Path, registry: Path) -> None:
    folder = import_model(source, "small", registry, origin="somewhere")
    (info,) = list_models(registry)
    assert info == show_model("small", registry)
    assert (info.name, info.config, info.tokenizer, info.origin) == ("small", CONFIG, "bytes", "somewhere")
    assert info.num_bytes > 4 * CONFIG.num_parameters
    ours, theirs = read_model(folder).state_dict(), read_model(source).state_dict()
    assert all((ours[name] == theirs[name]).all() for name in theirs)


def test_only_weights_config_and_tokenizer_are_kept_and_no_reference_to_code(source: Path, registry: Path) -> None:
    for name in ("modeling_evil.py", "pytorch_model.bin", "optimizer.safetensors", "state.json", "notes.txt"):
        (source / name).write_text("{}")
    for name in ("config.json", "tokenizer_config.json"):
        value = json.loads((source / name).read_text())
        (source / name).write_text(json.dumps({**value, "auto_map": {"AutoModel": "modeling_evil.Evil"}}))
    folder = import_model(source, "small", registry, origin="x")
    names = {path.name for path in folder.iterdir()}
    expected = {"config.json", "model.safetensors", "origin.json", "smelt_tokenizer.json", "tokenizer.json"}
    assert names == expected | {"tokenizer_config.json"}
    assert "auto_map" not in (folder / "config.json").read_text() + (folder / "tokenizer_config.json").read_text()


def test_shards_are_imported_with_their_index(tmp_path: Path, registry: Path) -> None:
    write_model(CONFIG, random_state(CONFIG), tmp_path / "shards", shard_bytes=3_000)
    folder = import_model(tmp_path / "shards", "shards", registry, origin="x")
    assert read_model(folder).config == CONFIG
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 1


def test_a_taken_or_bad_name_is_refused_before_anything_is_copied(source: Path, registry: Path) -> None:
    import_model(source, "small", registry, origin="x")
    with pytest.raises(AlreadyExists, match="smelt models rm small"):
        import_model(source, "small", registry, origin="x")
    with pytest.raises(InvalidInput, match=r"'\.\./up'"):
        import_model(source, "../up", registry, origin="x")
    assert [info.name for info in list_models(registry)] == ["small"]


def test_what_cannot_be_used_is_not_imported(source: Path, registry: Path) -> None:
    weights = source / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(UnsupportedModel, match="not a readable safetensors file"):
        import_model(source, "small", registry, origin="x")
    weights.rename(source / "pytorch_model.bin")
    with pytest.raises(UnsafeFile):
        import_model(source, "small", registry, origin="x")
    assert list_models(registry) == []


def test_a_failed_import_leaves_nothing(registry: Path) -> None:
    def fill() -> None:
        with new_model("half", registry, origin="x") as folder:
            (folder / "config.json").write_text("{}")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fill()
    assert [path.name for path in registry.iterdir()] == [".lock"]


def test_a_full_disk_is_out_of_space_and_leaves_nothing(
    source: Path, registry: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_source: Path, _target: Path) -> Iterator[int]:
        yield 1
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(model_files, "_copied", full)
    with pytest.raises(OutOfSpace, match="small"):
        import_model(source, "small", registry, origin="x")
    assert [path.name for path in registry.iterdir()] == [".lock"]


def test_what_would_not_fit_is_refused_before_it_is_copied(
    source: Path, registry: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = SimpleNamespace(free=1000)
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _folder: usage)
    monkeypatch.setattr(model_files, "_copied", None)
    with pytest.raises(OutOfSpace, match="free some"):
        import_model(source, "small", registry, origin="x")
    assert list_models(registry) == []


def test_copying_is_told_in_bytes(source: Path, registry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_files, "PIECE_BYTES", 1000)
    told: list[tuple[str, int, int | None]] = []
    import_model(source, "small", registry, "x", lambda *news: told.append(news))
    num_bytes = sum((source / path.name).stat().st_size for path in model_files.kept_files(source)[:1])
    assert len(told) > num_bytes / 1000
    stage, num_done, num_total = told[-1]
    assert stage == "copying"
    assert num_done == num_total
    assert num_total is not None
    assert num_total > num_bytes


def test_templates_and_settings_of_chats_are_kept(source: Path, registry: Path) -> None:
    (source / "additional_chat_templates").mkdir()
    for name in ("chat_template.jinja", "generation_config.json", "additional_chat_templates/tool_use.jinja"):
        (source / name).write_text('{"here": "' + name + '"}')
    (source / "additional_chat_templates" / "evil.py").write_text("")
    folder = import_model(source, "small", registry, origin="x")
    for name in ("chat_template.jinja", "generation_config.json", "additional_chat_templates/tool_use.jinja"):
        assert name in (folder / name).read_text()
    assert not (folder / "additional_chat_templates" / "evil.py").exists()


def test_an_import_that_goes_on_holds_up_no_other_change(source: Path, registry: Path) -> None:
    with new_model("slow", registry, origin="x") as folder:
        model_files.copy_model(source, folder)
        import_model(source, "quick", registry, origin="x")  # which clears leftovers, but not what is being filled
        set_alias("q", "quick", registry)
        remove_model("quick", registry, force=True)
    assert [info.name for info in list_models(registry)] == ["slow"]


def test_of_two_imports_to_one_name_the_second_to_end_is_refused(source: Path, registry: Path) -> None:
    def lose() -> None:
        with new_model("small", registry, origin="second"):
            import_model(source, "small", registry, origin="first")

    with pytest.raises(AlreadyExists):
        lose()
    assert [info.origin for info in list_models(registry)] == ["first"]
    assert not list(registry.glob(".tmp-*"))


def test_the_job_that_made_a_model_is_known(source: Path, registry: Path) -> None:
    import_model(source, "small", registry, origin="x", job="job-1")
    assert job_of("small", registry) == "job-1"
    assert job_of("other", registry) is None


def test_an_alias_comes_moves_and_goes(source: Path, registry: Path) -> None:
    for name in ("one", "two"):
        import_model(source, name, registry, origin="x")
    assert set_alias("short", "one", registry) == "one"
    assert set_alias("shorter", "short", registry) == "one"  # of an alias: the model
    assert show_model("short", registry) == show_model("one", registry)
    assert show_model("one", registry).aliases == ("short", "shorter")
    set_alias("short", "two", registry)
    assert [info.aliases for info in list_models(registry)] == [("shorter",), ("short",)]
    remove_alias("short", registry)
    assert read_aliases(registry) == {"shorter": "one"}
    with pytest.raises(NotFound, match="no alias 'short'; there are: shorter"):
        remove_alias("short", registry)


def test_an_alias_never_hides_a_model_nor_a_model_an_alias(source: Path, registry: Path) -> None:
    import_model(source, "one", registry, origin="x")
    with pytest.raises(AlreadyExists, match="a model is called 'one'"):
        set_alias("one", "one", registry)
    set_alias("short", "one", registry)
    with pytest.raises(AlreadyExists, match="'short' is an alias of one"):
        import_model(source, "short", registry, origin="x")
    with pytest.raises(NotFound, match="no registered model 'nothing'; registered: one"):
        set_alias("other", "nothing", registry)
    with pytest.raises(InvalidInput, match="smelt models alias default NAME"):
        set_alias("gpt", "one", registry)
    with pytest.raises(InvalidInput, match=r"\.\./up"):
        set_alias("../up", "one", registry)


def test_a_model_with_aliases_is_removed_only_with_them(source: Path, registry: Path) -> None:
    import_model(source, "one", registry, origin="x")
    set_alias("short", "one", registry)
    with pytest.raises(InvalidInput, match=r"'one' has aliases: short.*smelt models rm --force one"):
        remove_model("one", registry)
    assert show_model("one", registry).problem is None
    remove_model("one", registry, force=True)
    assert (list_models(registry), read_aliases(registry)) == ([], {})


def test_a_killed_change_of_the_aliases_leaves_the_old_ones(
    source: Path, registry: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import_model(source, "one", registry, origin="x")
    set_alias("short", "one", registry)

    def die(_path: Path, _target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "rename", die)
    with pytest.raises(KeyboardInterrupt):
        set_alias("other", "one", registry)
    assert read_aliases(registry) == {"short": "one"}


def test_leftovers_of_a_killed_import_are_cleared_by_the_next(source: Path, registry: Path) -> None:
    leftover = registry / ".tmp-small-123"
    leftover.mkdir(parents=True)
    (leftover / "model.safetensors").write_bytes(b"half")
    import_model(source, "small", registry, origin="x")
    assert not leftover.exists()


def test_export_writes_a_plain_folder_and_overwrites_nothing(source: Path, tmp_path: Path) -> None:
    export_model(source, tmp_path / "deep" / "exported")
    assert read_model(tmp_path / "deep" / "exported").config == CONFIG
    assert not (tmp_path / "deep" / "exported" / "origin.json").exists()
    with pytest.raises(AlreadyExists, match="not empty"):
        export_model(source, tmp_path / "deep" / "exported")
    (tmp_path / "empty").mkdir()
    export_model(source, tmp_path / "empty")
    assert read_model(tmp_path / "empty").config == CONFIG


def test_remove_touches_registered_models_only(source: Path, registry: Path) -> None:
    import_model(source, "small", registry, origin="x")
    with pytest.raises(NotFound, match="no registered model 'smal'; registered: small"):
        remove_model("smal", registry)
    for path in (str(source), "../../source", ".."):
        with pytest.raises(NotFound):
            remove_model(path, registry)
    remove_model("small", registry)
    assert list_models(registry) == []
    assert (source / "config.json").is_file()


def test_a_damaged_model_is_listed_with_its_problem(source: Path, registry: Path) -> None:
    folder = import_model(source, "small", registry, origin="x")
    (folder / "model.safetensors").unlink()
    (info,) = list_models(registry)
    assert info.config is None
    assert info.problem is not None
    assert "has no model.safetensors" in info.problem
    (folder / "origin.json").write_text("[]")
    assert list_models(registry)[0].problem is not None


def test_a_nanogpt_checkpoint_is_shown_only_after_import(tmp_path: Path, registry: Path) -> None:
    (tmp_path / "ckpt.pt").write_bytes(b"")
    with pytest.raises(InvalidInput, match="smelt models import"):
        show_model(str(tmp_path), registry)


def test_it_needs_no_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; import smelt.control.models"
    subprocess.run([sys.executable, "-c", code], check=True)


SLASHED = "Qwen/Qwen3-8B-Base"


def test_a_name_may_have_its_owner_before_it(source: Path, registry: Path) -> None:
    import_model(source, SLASHED, registry, origin="x")
    assert [info.name for info in list_models(registry)] == [SLASHED]
    assert show_model(SLASHED, registry) == show_model(str(registry / SLASHED), registry)
    set_alias("meta-llama/Llama-3.2-1B", SLASHED, registry)
    assert show_model("meta-llama/Llama-3.2-1B", registry).name == SLASHED
    import_model(source, "Qwen/other", registry, origin="x")
    remove_model("Qwen/other", registry)
    remove_model(SLASHED, registry, force=True)
    assert list_models(registry) == []
    import_model(source, "Qwen", registry, origin="x")  # nobody's owner any more
    assert read_aliases(registry) == {}


@pytest.mark.parametrize(
    "name",
    ["../out", "a/../b", "a/..", "./a", "/a", "a/", "a//b", "a/.hidden", "a/b/c", "a\\b", "a/b\n", "a/b\0"],
)
def test_no_name_leads_out_of_the_folder(name: str, source: Path, registry: Path) -> None:
    with pytest.raises(InvalidInput, match="two such parts with a slash"):
        import_model(source, name, registry, origin="x")
    with pytest.raises(InvalidInput, match="two such parts with a slash"):
        set_alias(name, "small", registry)
    with pytest.raises(NotFound):
        remove_model(name, registry)
    assert not (registry.parent / "out").exists()


def test_a_model_and_an_owner_of_models_cannot_have_one_name(source: Path, registry: Path) -> None:
    import_model(source, SLASHED, registry, origin="x")
    with pytest.raises(AlreadyExists, match="models are called Qwen/"):
        import_model(source, "Qwen", registry, origin="x")
    import_model(source, "small", registry, origin="x")
    with pytest.raises(AlreadyExists, match="'small' is taken"):
        import_model(source, "small/er", registry, origin="x")


def test_a_folder_within_a_model_is_no_model(source: Path, registry: Path) -> None:
    within = import_model(source, "small", registry, origin="x") / "1_Pooling"
    within.mkdir()
    (within / "config.json").write_text("{}")
    assert [info.name for info in list_models(registry)] == ["small"]
    with pytest.raises(NotFound):
        remove_model("small/1_Pooling", registry)


def test_an_owner_whom_a_death_left_without_models_is_in_nobodys_way(source: Path, registry: Path) -> None:
    (registry / "Qwen").mkdir(parents=True)
    import_model(source, "Qwen", registry, origin="x")
    assert show_model("Qwen", registry).config == CONFIG


def test_a_classifier_is_a_model_too(tmp_path: Path) -> None:
    registry = tmp_path / "models"
    save_small_classifier(tmp_path / "news")
    import_model(tmp_path / "news", "news", registry, "elsewhere")
    (info,) = list_models(registry)
    assert info.problem is None
    assert info.config is None
    assert info.classifier is not None
    assert info.classifier.labels == LABELS
    export_model(registry / "news", tmp_path / "out")
    assert read_classifier(tmp_path / "out").config == info.classifier
    (registry / "news" / "model.safetensors").write_bytes(b"")
    assert "not a readable safetensors file" in (show_model("news", registry).problem or "")
