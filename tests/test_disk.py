import stat
from pathlib import Path

import pytest

from smelt import disk
from smelt.disk import write_once


def test_the_first_one_to_write_stays(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    write_once(path, b"first")
    write_once(path, b"second")
    assert path.read_bytes() == b"first"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [file.name for file in tmp_path.iterdir()] == ["secret"]


def test_one_that_was_faster_in_between_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "secret"
    monkeypatch.setattr(disk, "sync", lambda _: path.write_bytes(b"theirs"))
    write_once(path, b"ours")
    assert path.read_bytes() == b"theirs"
    assert [file.name for file in tmp_path.iterdir()] == ["secret"]


def test_what_failed_half_way_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: Path) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(disk, "sync", full)
    with pytest.raises(OSError, match="no space"):
        write_once(tmp_path / "secret", b"ours")
    assert not list(tmp_path.iterdir())
