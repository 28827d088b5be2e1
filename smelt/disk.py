"""What a durable write needs: flush a file or a folder to the disk, and know a full one; knows no file's content."""

import errno
import os
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT)


def sync(path: Path) -> None:
    """Return when a file's bytes, or the names in a folder, would survive a power loss."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_full(error: OSError) -> bool:
    """Whether the disk, or somebody's share of it, had no room left."""
    return error.errno in FULL
