import errno
import os
import signal
import subprocess
import sys

import pytest

from smelt.data.staging import remove_folder, staged
from smelt.errors import AlreadyExists, InvalidInput, OutOfSpace


def test_a_folder_appears_when_the_block_ends(tmp_path):
    with staged(tmp_path / "home" / "new") as folder:
        (folder / "file").write_text("content")
        assert not (tmp_path / "home" / "new").exists()
    assert (tmp_path / "home" / "new" / "file").read_text() == "content"
    assert {path.name for path in (tmp_path / "home").iterdir()} == {"new", ".lock"}


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt()])
def test_a_failed_block_leaves_nothing(error, tmp_path):
    with pytest.raises(type(error)), staged(tmp_path / "new") as folder:  # noqa: PT012 - the block is what is tested
        (folder / "file").write_text("content")
        raise error
    assert {path.name for path in tmp_path.iterdir()} == {".lock"}


def test_a_full_disk_is_said(tmp_path):
    with pytest.raises(OutOfSpace, match="is full; nothing was added"), staged(tmp_path / "new"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert {path.name for path in tmp_path.iterdir()} == {".lock"}


def test_a_taken_name_is_refused_before_and_after(tmp_path):
    (tmp_path / "old").mkdir()
    with pytest.raises(AlreadyExists, match="old already exists"), staged(tmp_path / "old"):
        pytest.fail("the block must not run")
    with pytest.raises(AlreadyExists, match="late already exists"), staged(tmp_path / "late"):
        (tmp_path / "late").mkdir()


def test_a_place_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidInput, match="SMELT_HOME"), staged(tmp_path / "file" / "new"):
        pytest.fail("the block must not run")


KILLED = """
import sys
from pathlib import Path
from smelt.data.staging import staged
with staged(Path(sys.argv[1]) / "killed") as folder:
    (folder / "file").write_text("half")
    print("ready", flush=True)
    sys.stdin.read()
"""


def test_what_a_killed_writer_left_is_removed_and_a_living_one_is_left_alone(tmp_path):
    writers = [
        subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    for writer in writers:
        assert writer.stdout.readline() == b"ready\n"
    os.kill(writers[0].pid, signal.SIGKILL)
    writers[0].communicate()
    assert len(list(tmp_path.glob(".tmp-killed-*"))) == 2
    with staged(tmp_path / "next"):
        assert len(list(tmp_path.glob(".tmp-killed-*"))) == 1
    writers[1].communicate()  # its standard input ends, and so does its block
    assert {path.name for path in tmp_path.iterdir()} == {".lock", "next", "killed"}


def test_removal_frees_the_name(tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "file").write_text("")
    remove_folder(tmp_path / "old")
    assert list(tmp_path.iterdir()) == []
