"""The memory of this machine, or of the container that we live in; knows no device but the CPU, and no torch."""

import os
from pathlib import Path

MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")


def host_bytes() -> int:
    """All that a process here could ever have."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = _limit()
    return total if limit is None else min(total, limit)


def free_host_bytes() -> int:
    """What could be taken now: the less of what the system and a container's limit leave."""
    available = host_bytes()
    if MEMINFO.is_file():
        lines = dict(line.split(":", 1) for line in MEMINFO.read_text(encoding="utf-8").splitlines())
        available = int(lines["MemAvailable"].split()[0]) * 1024
    if (limit := _limit()) is not None:
        used = int((CGROUP / "memory.current").read_text(encoding="utf-8"))
        available = min(available, max(0, limit - used))
    return available


def _limit() -> int | None:
    limit = CGROUP / "memory.max"
    text = limit.read_text(encoding="utf-8").strip() if limit.is_file() else "max"
    return None if text == "max" else int(text)
