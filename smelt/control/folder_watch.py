"""Folders under watch: wakes whoever waits for one when something in it changes; knows nothing of what is in them.

All folders are watched by one thread, however many wait.
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from watchfiles import awatch

DEBOUNCE_MS = 100


class FolderWatch:
    """Wakes whoever waits for a folder when something in it changes."""

    def __init__(self) -> None:
        self._waiting: dict[Path, set[asyncio.Event]] = {}
        self._task: asyncio.Task[None] | None = None
        self._is_stale = asyncio.Event()
        self._polls: bool | None = None  # None: only where this system has no notifications

    @contextmanager
    def on(self, folder: Path) -> Iterator[asyncio.Event]:
        """An event that is set by each change while the block lasts; the reader clears it."""
        changed = asyncio.Event()
        if folder not in self._waiting:
            self._is_stale.set()
        self._waiting.setdefault(folder, set()).add(changed)
        if self._task is None:
            self._task = asyncio.create_task(self._watch())
        try:
            yield changed
        finally:
            self._waiting[folder].discard(changed)
            if not self._waiting[folder]:
                del self._waiting[folder]
                self._is_stale.set()

    async def _watch(self) -> None:
        """Watch all folders by one thread, and begin anew when there are others."""
        while self._waiting:
            self._is_stale.clear()
            folders = [folder for folder in self._waiting if folder.is_dir()]
            self._wake(list(self._waiting))  # for what has changed meanwhile
            try:
                async for changes in awatch(
                    *folders,
                    stop_event=self._is_stale,
                    recursive=False,
                    debounce=DEBOUNCE_MS,
                    watch_filter=None,
                    force_polling=self._polls,
                ):
                    self._wake([Path(path).parent for _, path in changes])
            except FileNotFoundError:  # one was removed just now
                continue
            except OSError:  # the system lets nobody watch any more folders
                self._polls = True
        self._task = None

    def _wake(self, folders: list[Path]) -> None:
        for folder in folders:
            for changed in self._waiting.get(folder, ()):
                changed.set()
