"""Bodies too large for a row, as files named by their sha256; knows nothing of what is in them or who needs them.

A name appears only when the whole body is on the disk, and the same body is kept once.
"""

import hashlib
import os
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from smelt.disk import is_full, sync
from smelt.errors import OutOfSpace, StorageError
from smelt.storage.faults import Fault, no_fault

PREFIX = ".tmp-"


class Files:
    """The bodies of one folder, which no other process writes to."""

    def __init__(self, folder: Path, fault: Fault = no_fault, clock: Callable[[], float] = time.time) -> None:
        self.folder = folder
        self._fault = fault
        self._clock = clock
        # Between finding a body old and removing it, `put` must not find it there.
        self._lock = threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(f"{PREFIX}*"):
            left.unlink()

    def put(self, body: bytes) -> str:
        """Keep a body and return its sha256 in hex, once it is on the disk. OutOfSpace where the disk is full."""
        digest = hashlib.sha256(body).hexdigest()
        if not self._renewed(digest):
            try:
                self._write(body, self.folder / digest)
            except OSError as error:
                if not is_full(error):
                    raise StorageError(f"{self.folder} cannot be written: {error.strerror}") from None
                raise OutOfSpace(f"the disk of {self.folder} is full; free some space and try again") from None
        return digest

    def read(self, digest: str) -> bytes:
        """The body of that sha256. StorageError where it is gone, or is no longer what it was."""
        try:
            body = (self.folder / digest).read_bytes()
        except FileNotFoundError:
            raise StorageError(f"{self.folder / digest} is gone: was it removed by hand?") from None
        if hashlib.sha256(body).hexdigest() != digest:
            raise StorageError(f"{self.folder / digest} is damaged: its sha256 is another")
        return body

    def collect(self, referenced: set[str], min_age_s: float) -> int:
        """Remove bodies that nobody refers to; returns how many.

        `min_age_s` protects a body whose row is not committed yet.
        """
        num_removed = 0
        for path in self.folder.iterdir():
            if path.name in referenced or path.name.startswith(PREFIX):
                continue
            with self._lock:
                if self._clock() - path.stat().st_mtime >= min_age_s:
                    path.unlink()
                    num_removed += 1
        return num_removed

    def _renewed(self, digest: str) -> bool:
        """Whether the body is there already; if so, it counts as new again."""
        with self._lock:
            path = self.folder / digest
            if not path.exists():
                return False
            now = self._clock()
            os.utime(path, (now, now))
        # Whoever wrote it may have died before the folder was synced.
        sync(self.folder)
        return True

    def _write(self, body: bytes, path: Path) -> None:
        descriptor, name = tempfile.mkstemp(prefix=PREFIX, dir=self.folder)
        temporary = Path(name)
        try:
            with os.fdopen(descriptor, "wb") as file:
                half = len(body) // 2
                file.write(body[:half])
                file.flush()
                self._fault("mid_file_write")
                file.write(body[half:])
                file.flush()
                os.fsync(file.fileno())
            now = self._clock()
            os.utime(temporary, (now, now))
            temporary.rename(path)
            self._fault("between_rename_and_fsync")
            sync(self.folder)
        finally:
            temporary.unlink(missing_ok=True)
