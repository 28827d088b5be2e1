"""What a durable write needs: flush to the disk, know a full one, write a file once; knows no file's content."""

import errno
import os
import shutil
from contextlib import suppress
from pathlib import Path

from smelt.errors import OutOfSpace

FULL = (errno.ENOSPC, errno.EDQUOT)


def sync(path: Path) -> None:
    """Return when a file's bytes, or the names in a folder, would survive a power loss."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_once(path: Path, body: bytes) -> None:
    """Write a file that only its owner may read, whole or not at all, unless it is there: the first one stays."""
    if path.is_file():
        return
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(body)
        sync(temporary)
        with suppress(FileExistsError):  # another process was faster
            path.hardlink_to(temporary)
    finally:
        temporary.unlink()


def read_ahead(path: Path) -> None:
    """Have the system read a file into memory in one go, beside us: by page faults it would come in small pieces."""
    if not hasattr(os, "posix_fadvise"):  # macOS
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
    finally:
        os.close(descriptor)


def check_room(folder: Path, num_bytes: int) -> None:
    """OutOfSpace where that many bytes more do not fit on the disk of a folder, which need not exist yet."""
    place = next(parent for parent in (folder, *folder.parents) if parent.exists())
    num_free = shutil.disk_usage(place).free
    if num_bytes > num_free:
        raise OutOfSpace(
            f"{folder} needs {num_bytes / 2**20:,.0f} MiB, and its disk has {num_free / 2**20:,.0f} MiB left; free some"
        )


def is_full(error: OSError) -> bool:
    """Whether the disk, or somebody's share of it, had no room left."""
    return error.errno in FULL
