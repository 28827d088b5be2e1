import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import errors

from smelt.errors import InvalidInput, MissingDependency, NotFound, OutOfSpace, StorageError
from smelt.models import registry
from smelt.models.aliases import ALIASES_FILE, read_aliases, write_aliases
from smelt.models.registry import check_name, registered_name, registered_names, resolve


def make_model(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"")
    return folder


def test_a_registered_name_is_found_and_wins_over_a_folder_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    here = make_model(tmp_path / "small")
    assert resolve("small", tmp_path / "models") == here
    registered = make_model(tmp_path / "models" / "small")
    assert resolve("small", tmp_path / "models") == registered
    assert resolve("./small", tmp_path / "models") == here


def test_an_alias_means_its_model_and_wins_over_a_folder_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    models = tmp_path / "models"
    target = make_model(models / "small-2")
    here = make_model(tmp_path / "short")
    assert resolve("short", models) == here
    write_aliases({"short": "small-2"}, models)
    assert resolve("short", models) == target
    assert resolve("./short", models) == here
    write_aliases({"short": "gone"}, models)
    assert registered_name("short", models) is None


def test_gpt_and_default_mean_the_only_model_or_the_one_that_was_named_so(tmp_path: Path) -> None:
    only = make_model(tmp_path / "only")
    assert resolve("gpt", tmp_path) == resolve("default", tmp_path) == only
    other = make_model(tmp_path / "other")
    with pytest.raises(NotFound, match="no model or folder 'gpt'; choose the default model"):
        resolve("gpt", tmp_path)
    write_aliases({"default": "other"}, tmp_path)
    assert resolve("gpt", tmp_path) == resolve("default", tmp_path) == other


def test_an_underscore_may_stand_for_a_dash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    models = tmp_path / "models"
    medium = make_model(models / "gpt2-medium")
    assert resolve("gpt2_medium", models) == medium
    here = make_model(tmp_path / "gpt2_medium")
    assert resolve("gpt2_medium", models) == here
    large = make_model(tmp_path / "snapshot")
    use_hub(monkeypatch, {"openai-community/gpt2-large": large}, {})
    assert resolve("gpt2_large", models) == large


@pytest.mark.parametrize("text", ["{", "[]", '{"short": 1}'])
def test_damaged_aliases_are_said_to_be(tmp_path: Path, text: str) -> None:
    (tmp_path / ALIASES_FILE).write_text(text)
    with pytest.raises(StorageError, match=r"aliases\.json"):
        read_aliases(tmp_path)


def test_a_run_means_its_best_checkpoint_or_else_its_last(tmp_path: Path) -> None:
    first = make_model(tmp_path / "out" / "checkpoints" / "step-1")
    second = make_model(tmp_path / "out" / "checkpoints" / "step-2")
    (tmp_path / "out" / "last").symlink_to("checkpoints/step-2")
    assert resolve(str(tmp_path / "out"), tmp_path) == second
    (tmp_path / "out" / "best").symlink_to("checkpoints/step-1")
    assert resolve(str(tmp_path / "out"), tmp_path) == first


def test_nanogpt_checkpoints_are_found_by_file_and_by_folder(tmp_path: Path) -> None:
    (tmp_path / "ckpt.pt").write_bytes(b"")
    assert resolve(str(tmp_path), tmp_path / "models") == tmp_path / "ckpt.pt"
    assert resolve(str(tmp_path / "ckpt.pt"), tmp_path / "models") == tmp_path / "ckpt.pt"


def test_what_is_no_model_says_what_it_looked_for(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(InvalidInput, match="give the model's folder"):
        resolve(str(tmp_path / "notes.txt"), tmp_path)
    with pytest.raises(NotFound, match=r"config.json.*nor checkpoints of a run.*ckpt.pt"):
        resolve(str(tmp_path), tmp_path / "models")


def test_an_unknown_name_lists_what_exists_and_what_is_near(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no model is registered yet"):
        resolve("shakespeare", tmp_path)
    make_model(tmp_path / "shakespear")
    make_model(tmp_path / "docs")
    with pytest.raises(NotFound, match=r"did you mean shakespear\?; registered models: docs, shakespear"):
        resolve("shakespeare", tmp_path)


def test_unfinished_and_foreign_folders_are_not_names(tmp_path: Path) -> None:
    make_model(tmp_path / ".importing-1")
    (tmp_path / "empty").mkdir()
    make_model(tmp_path / "good")
    assert registered_names(tmp_path) == ["good"]
    assert registered_names(tmp_path / "nowhere") == []


@pytest.mark.parametrize("name", ["", "../up", ".hidden", "a/b/c", "a/../b", "a" * 65, "sp ace", "hf:x", "-rf"])
def test_names_that_could_leave_the_folder_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="must begin with a letter or digit"):
        check_name(name)
    assert not registry.is_registered(name, tmp_path)


class FakeHub:
    """A hub with some repositories in the cache and some on the network."""

    errors = errors
    constants = SimpleNamespace(HF_HUB_CACHE="/nowhere/hub")
    num_bytes = 1000  # of what is not in the cache

    def __init__(self, cached: dict[str, Path], remote: dict[str, Path | OSError]) -> None:
        self.cached, self.remote = cached, remote

    def snapshot_download(
        self,
        repository: str,
        allow_patterns: tuple[str, ...],
        local_files_only: bool = False,
        dry_run: bool = False,
        tqdm_class: type | None = None,
    ) -> Any:
        assert not any("*.py" in pattern or pattern == "*" for pattern in allow_patterns)
        if local_files_only:
            if repository not in self.cached:
                raise errors.LocalEntryNotFoundError(repository)
            return str(self.cached[repository])
        found = self.remote.get(repository, errors.OfflineModeIsEnabled("offline mode"))
        if isinstance(found, OSError):
            raise found
        if dry_run:
            return [SimpleNamespace(file_size=self.num_bytes, will_download=True)]
        if tqdm_class is not None:
            with tqdm_class(total=self.num_bytes, unit="B") as bar, tqdm_class(total=2) as files:
                bar.update(self.num_bytes)
                files.update(2)
        return str(found)


def use_hub(monkeypatch: pytest.MonkeyPatch, cached: dict[str, Path], remote: dict[str, Path | OSError]) -> FakeHub:
    hub = FakeHub(cached, remote)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)  # type: ignore[arg-type]
    return hub


def test_gpt2_comes_from_the_cache_by_either_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(tmp_path / "snapshot")
    use_hub(monkeypatch, {"gpt2": model}, {})
    assert resolve("gpt2", tmp_path / "models") == model
    use_hub(monkeypatch, {"openai-community/gpt2": model}, {})
    assert resolve("gpt2", tmp_path / "models") == model


def test_a_cache_with_only_a_tokenizer_is_not_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    partial = tmp_path / "partial"
    partial.mkdir()
    model = make_model(tmp_path / "whole")
    use_hub(monkeypatch, {"org/name": partial}, {"org/name": model})
    assert resolve("hf:org/name", tmp_path / "models") == model


def test_offline_and_not_cached_names_the_remedies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_hub(monkeypatch, {}, {})
    with pytest.raises(MissingDependency, match=r"not in the local hub cache.*offline mode.*HF_HOME"):
        resolve("gpt2-xl", tmp_path)


def test_what_is_fetched_is_told_in_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(tmp_path / "fetched")
    use_hub(monkeypatch, {}, {"org/name": model})
    told: list[tuple[str, int, int | None]] = []
    assert resolve("hf:org/name", tmp_path, lambda *news: told.append(news)) == model
    assert told == [("fetching", 1000, 1000)]


def test_nothing_is_fetched_that_would_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = use_hub(monkeypatch, {}, {"org/name": tmp_path})
    hub.num_bytes = 1 << 60
    with pytest.raises(OutOfSpace, match=r"/nowhere/hub needs 1,099,511,627,776 MiB"):
        resolve("hf:org/name", tmp_path)


def test_an_unknown_repository_is_not_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    response = SimpleNamespace(headers={}, request=None, status_code=404)
    missing = errors.RepositoryNotFoundError("404", response=response)  # type: ignore[arg-type]
    use_hub(monkeypatch, {}, {"org/nothing": missing})
    with pytest.raises(NotFound, match="has no org/nothing"):
        resolve("hf:org/nothing", tmp_path)


def test_the_hub_library_is_optional(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingDependency, match=r"pip install 'smelt\[hub\]'"):
        resolve("hf:org/name", tmp_path)


@pytest.mark.parametrize("repository", ["../etc", "a/b/c", "", "-x/y"])
def test_a_repository_name_is_checked(repository: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="hf:ORG/NAME"):
        resolve(f"hf:{repository}", tmp_path)
