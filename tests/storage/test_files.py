"""Files by content: whole or not there, once, checked when read, and removed only when old and unnamed."""

import errno
import hashlib
import os
from pathlib import Path

import pytest

from smelt.errors import OutOfSpace, StorageError
from smelt.storage.files import Files


def test_a_body_comes_back_under_its_sha256(files: Files) -> None:
    digest = files.put(b"body")
    assert digest == hashlib.sha256(b"body").hexdigest()
    assert files.read(digest) == b"body"
    assert files.put(b"body") == digest
    assert [path.name for path in files.folder.iterdir()] == [digest]


def test_a_damaged_body_is_not_given_out(files: Files) -> None:
    digest = files.put(b"body")
    (files.folder / digest).write_bytes(b"bode")
    with pytest.raises(StorageError, match=f"{digest} is damaged"):
        files.read(digest)
    (files.folder / digest).unlink()
    with pytest.raises(StorageError, match="is gone"):
        files.read(digest)


def test_only_old_bodies_that_nobody_names_are_removed(tmp_path: Path) -> None:
    now = 1000.0
    files = Files(tmp_path, clock=lambda: now)
    named, unnamed, asked_again = files.put(b"named"), files.put(b"unnamed"), files.put(b"again")
    now += 60
    files.put(b"again")
    young = files.put(b"young")
    assert files.collect({named}, min_age_s=60) == 1
    assert {path.name for path in tmp_path.iterdir()} == {named, asked_again, young}
    with pytest.raises(StorageError):
        files.read(unnamed)


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".tmp-left").write_bytes(b"half")
    Files(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("code", "error"), [(errno.ENOSPC, OutOfSpace), (errno.EIO, StorageError)])
def test_a_failing_disk_leaves_nothing(
    files: Files, monkeypatch: pytest.MonkeyPatch, code: int, error: type[Exception]
) -> None:
    def fail(_descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(error):
        files.put(b"body")
    assert not list(files.folder.iterdir())
