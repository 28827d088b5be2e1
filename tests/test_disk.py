import stat
from pathlib import Path

import pytest

from smelt import disk
from smelt.disk import check_room, read_ahead, write_once
from smelt.errors import OutOfSpace


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


def test_what_does_not_fit_is_refused_with_both_numbers(tmp_path: Path) -> None:
    check_room(tmp_path / "not" / "yet" / "there", 1)
    with pytest.raises(OutOfSpace, match=r"needs 1,099,511,627,776 MiB, and its disk has [\d,]+ MiB left"):
        check_room(tmp_path / "not" / "yet" / "there", 1 << 60)


def test_to_read_ahead_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 10_000)
    read_ahead(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"x" * 10_000
