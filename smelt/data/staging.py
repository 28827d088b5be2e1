"""Folders that appear whole or not at all; knows nothing of what is in them.

What is being written lies in `.tmp-NAME-...`, locked while its writer lives, and gets its name by a rename once
everything is on the disk. What a killed writer left behind is removed by the next one.
"""

import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from smelt.disk import is_full, sync
from smelt.errors import AlreadyExists, InvalidInput, OutOfSpace

PREFIX = ".tmp-"


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """An empty folder that becomes `folder` when the block ends, and vanishes when it fails.

    AlreadyExists where the name is taken, OutOfSpace where the disk is full, InvalidInput where the place cannot
    be written.
    """
    _refuse_taken(folder)
    try:
        temporary, lock = _locked_folder(folder)
    except OSError as error:
        raise _explained(error, folder) from None
    try:
        yield temporary
        sync_tree(temporary)
        _refuse_taken(folder)
        temporary.rename(folder)
        sync(folder.parent)
    except OSError as error:
        if is_full(error):
            raise _explained(error, folder) from None
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            _refuse_taken(folder)
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        os.close(lock)


def _refuse_taken(folder: Path) -> None:
    if folder.exists():
        raise AlreadyExists(f"{folder.name} already exists in {folder.parent}; remove it, or choose another name")


def _explained(error: OSError, folder: Path) -> OutOfSpace | InvalidInput:
    if is_full(error):
        return OutOfSpace(f"the disk of {folder.parent} is full; nothing was added. Free some space and try again")
    return InvalidInput(f"{folder.parent} cannot be written: {error.strerror}; set SMELT_HOME to a folder of yours")


def _locked_folder(folder: Path) -> tuple[Path, int]:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / ".lock").open("w") as gate:
        # Only one process at a time makes or removes temporary folders: a new one cannot be taken for a left one.
        fcntl.flock(gate, fcntl.LOCK_EX)
        remove_leftovers(folder.parent)
        temporary = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{folder.name}-", dir=folder.parent))
        lock = os.open(temporary, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX)
    return temporary, lock


def remove_leftovers(parent: Path) -> None:
    """Remove temporary folders whose writers are gone."""
    for left in parent.glob(f"{PREFIX}*"):
        descriptor = os.open(left, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(left)
        except BlockingIOError:
            continue  # its writer lives
        finally:
            os.close(descriptor)


def remove_folder(folder: Path) -> None:
    """Take a folder away: its name is free at once, whatever happens while its files are removed."""
    temporary = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{folder.name}-", dir=folder.parent))
    folder.rename(temporary / "removed")
    shutil.rmtree(temporary)


def sync_tree(folder: Path) -> None:
    """Flush every file and folder to the disk."""
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)
