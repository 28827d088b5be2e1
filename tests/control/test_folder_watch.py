"""Watching folders: woken by changes, one thread for all, and a way on where the system allows no more watches."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from smelt.control import folder_watch
from smelt.control.folder_watch import FolderWatch

pytestmark = pytest.mark.anyio


async def test_the_watch_ends_with_those_who_wait_and_goes_on_without_a_missing_folder(tmp_path: Path) -> None:
    watch = FolderWatch()
    with watch.on(tmp_path) as changed, watch.on(tmp_path / "missing"):
        task = watch._task
        async with asyncio.timeout(10):
            for name in ("first", "second"):
                await changed.wait()
                changed.clear()
                (tmp_path / name).write_text("x")
            await changed.wait()
    assert task is not None
    async with asyncio.timeout(10):
        await task


async def test_where_nobody_may_watch_more_folders_they_are_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, polls = folder_watch.awatch, []

    def refuse_notifications(*folders: Path, force_polling: bool | None, **options: Any) -> Any:
        polls.append(force_polling)
        if not force_polling:
            raise OSError(28, "OS file watch limit reached")
        return real(*folders, force_polling=force_polling, **options)

    monkeypatch.setattr(folder_watch, "awatch", refuse_notifications)
    with FolderWatch().on(tmp_path) as changed:
        async with asyncio.timeout(10):
            await changed.wait()
            changed.clear()
            while len(polls) < 2:
                await changed.wait()
                changed.clear()
            (tmp_path / "new").write_text("x")
            await changed.wait()
    assert polls[:2] == [None, True]
