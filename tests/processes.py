"""Real processes in tests: those below a pid, whether one lives, waiting for what must become true; needs /proc."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest

T = TypeVar("T")

needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="not on this platform: no /proc")


def is_alive(pid: int) -> bool:
    """Whether it runs; a zombie does not."""
    try:
        return stat_of(pid)[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def stat_of(pid: int) -> list[str]:
    """The fields of its stat file, from its state on."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def command_of(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()


def children_of(parent: int) -> dict[int, str]:
    """pid -> command of its living children."""
    found = {}
    for name in os.listdir("/proc"):
        try:
            if name.isdigit() and int(stat_of(int(name))[1]) == parent and is_alive(int(name)):
                found[int(name)] = command_of(int(name))
        except (FileNotFoundError, ProcessLookupError):  # gone while we looked
            continue
    return found


def all_below(pid: int) -> set[int]:
    """Its living descendants."""
    below = set(children_of(pid))
    return below | {further for child in below for further in all_below(child)}


def eventually(look: Callable[[], T], what: str, seconds: float = 20.0) -> T:
    """What `look` gives, as soon as it is true."""
    until = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < until, f"{what} did not come true within {seconds:g} s"
        time.sleep(0.02)
    return found
