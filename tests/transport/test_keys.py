"""The key of workers: made once, readable by its owner alone, refused when it could be guessed."""

import stat
from pathlib import Path

import pytest

from smelt.errors import ConfigError
from smelt.transport.keys import make_key, read_key


def test_a_key_is_made_once_and_for_its_owner_alone(tmp_path: Path) -> None:
    key = make_key(tmp_path / "worker.key")
    assert len(key) == 64
    assert make_key(tmp_path / "worker.key") == read_key(tmp_path / "worker.key") == key
    assert stat.S_IMODE((tmp_path / "worker.key").stat().st_mode) == 0o600
    assert make_key(tmp_path / "another.key") != key


def test_a_key_that_could_be_guessed_is_refused(tmp_path: Path) -> None:
    (tmp_path / "worker.key").write_text("secret\n")
    with pytest.raises(ConfigError, match="can be guessed"):
        make_key(tmp_path / "worker.key")


def test_a_missing_key_is_named_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.key .*copy the server's"):
        read_key(tmp_path / "absent.key")
