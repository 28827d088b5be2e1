"""Settings: flags over environment over smelt.yaml over defaults, and what is said about wrong ones."""

from pathlib import Path

import pytest

from smelt.errors import ConfigError, NotFound
from smelt.settings import Settings, environment_of, load_settings, setting_sources, tiktoken_cache, use_config_file


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, which is where smelt.yaml is looked for."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_settings(text: str) -> None:
    Path("smelt.yaml").write_text(text)


def test_defaults() -> None:
    settings = load_settings()
    assert settings.home == Path.home() / ".smelt"
    assert (settings.device, settings.dtype, settings.threads) == ("auto", "auto", None)


def test_the_file_wins_over_defaults() -> None:
    write_settings("device: cpu\nthreads: 3\n")
    assert (load_settings().device, load_settings().threads) == ("cpu", 3)


def test_the_environment_wins_over_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    write_settings("threads: 3\ndevice: cpu\n")
    monkeypatch.setenv("SMELT_THREADS", "4")
    assert (load_settings().threads, load_settings().device) == (4, "cpu")


def test_flags_win_over_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    write_settings("threads: 3\n")
    monkeypatch.setenv("SMELT_THREADS", "4")
    assert load_settings(threads=5).threads == 5


def test_a_flag_that_was_not_given_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMELT_THREADS", "4")
    assert load_settings(threads=None).threads == 4


def test_an_empty_variable_is_one_that_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMELT_THREADS", "")
    monkeypatch.setenv("SMELT_DEVICE", "")
    assert (load_settings().threads, load_settings().device) == (None, "auto")


def test_each_source_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    write_settings("threads: 3\ndevice: cpu\n")
    monkeypatch.setenv("SMELT_THREADS", "4")
    sources = setting_sources()
    assert (sources["home"], sources["device"], sources["threads"]) == ("default", "smelt.yaml", "SMELT_THREADS")


def test_home_is_absolute_and_knows_the_users_folder(monkeypatch: pytest.MonkeyPatch, workplace: Path) -> None:
    assert load_settings(home="~/models").home == Path.home() / "models"
    settings = load_settings(home="here")
    assert settings.home == workplace / "here"
    assert (settings.datasets, settings.models, settings.runs) == tuple(
        workplace / "here" / name for name in ("datasets", "models", "runs")
    )


def test_an_unknown_key_in_the_file_is_named_with_the_known_ones() -> None:
    write_settings("hoem: /data\n")
    with pytest.raises(ConfigError, match="unknown key 'hoem'; known keys: .*home, host"):
        load_settings()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("threads: 0", "threads: Input should be greater than or equal to 1 .got 0"),
        ("dtype: float8", "dtype: Input should be 'auto', 'float32'"),
        ("home: [1", "not valid yaml"),
        ("- home", "must hold a mapping of keys to values, not list"),
        ("home", "must hold a mapping of keys to values, not str"),
    ],
)
def test_a_bad_file_is_one_clear_error(text: str, message: str) -> None:
    write_settings(text)
    with pytest.raises(ConfigError, match=message):
        load_settings()


def test_a_bad_variable_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMELT_THREADS", "many")
    with pytest.raises(ConfigError, match="threads: .*unable to parse.*'many'"):
        load_settings()


def test_settings_cannot_change_under_a_run() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_settings().threads = 2  # type: ignore[misc]


def test_tiktokens_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "/vocabularies")
    assert tiktoken_cache() == Path("/vocabularies")
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR")
    assert tiktoken_cache() is None


def test_every_setting_says_what_it_is() -> None:
    assert all(field.description for field in Settings.model_fields.values())


def test_the_port_of_a_hosting_service_is_honoured(monkeypatch: pytest.MonkeyPatch, workplace: Path) -> None:
    monkeypatch.setenv("PORT", "5005")
    assert load_settings().port == 5005
    monkeypatch.setenv("SMELT_PORT", "5006")
    assert load_settings().port == 5006
    assert load_settings(port=5007).port == 5007


def test_another_file_may_take_the_place_of_the_usual_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMELT_CONFIG", "")  # so that it is put back
    write_settings("threads: 3\n")
    (tmp_path / "other.yaml").write_text("device: cpu\n")
    use_config_file(Path("other.yaml"))
    assert (load_settings().threads, load_settings().device) == (None, "cpu")
    assert setting_sources()["device"] == str(tmp_path / "other.yaml")


def test_another_file_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMELT_CONFIG", "absent.yaml")
    with pytest.raises(NotFound, match="absent.yaml"):
        load_settings()


def test_an_environment_carries_the_settings_with_their_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_settings("threads: 3\nallowed_hosts: [a.example, b.example]\n")
    settings = load_settings(home=tmp_path / "home", port=0, device="cpu")
    write_settings("threads: 4\n")
    for name, value in environment_of(settings).items():
        monkeypatch.setenv(name, value)
    assert load_settings() == settings


def test_what_can_be_made_again_lies_with_the_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert load_settings(home="elsewhere").kernels == tmp_path / "smelt" / "kernels"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert load_settings().kernels == Path.home() / ".cache" / "smelt" / "kernels"
