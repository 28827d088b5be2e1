"""`kill -9` at every named point and at any moment: what was acknowledged is there, once; and it is on the disk."""

import asyncio
import random
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import Engine, select, text

from smelt.storage import tables
from smelt.storage.database import sqlite_url
from smelt.storage.faults import LEDGER_POINTS
from smelt.storage.files import Files
from smelt.storage.futures import Ledger
from smelt.storage.transitions import future_id
from smelt.storage.writer import Writer
from victim import NUM_LANES, NUM_SEQS, submission

VICTIM = Path(__file__).parents[1] / "victim.py"
PLACES = [(lane, seq) for lane in range(NUM_LANES) for seq in range(1, NUM_SEQS + 1)]


def start(url: str, folder: Path, fault: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(VICTIM), url, str(folder / "bodies"), fault]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def promises(output: str) -> dict[str, list[str]]:
    """word -> ids that it was said of; a last line that was cut off was no promise."""
    lines = [line.split() for line in output.splitlines(keepends=True) if line.endswith("\n")]
    return {word: [line[1] for line in lines if line[0] == word] for word in ("accepted", "finished")}


async def serve_the_rest(ledger: Ledger) -> None:
    """As clients and a worker do after a crash: everything is asked for again, and done."""
    epoch = await ledger.open_epoch()
    ids = await asyncio.gather(*[ledger.accept(submission(*place)) for place in PLACES])
    assert ids == [future_id(f"lane {lane}", seq) for lane, seq in PLACES]
    states = [(await ledger.read("ann", name)).state for name in ids]
    num_left = states.count("queued")
    assert num_left + states.count("done") == len(PLACES)
    while num_left:
        for granted in await ledger.next_grants(epoch, 100, ("step",)):
            await ledger.finish(granted.id, epoch, granted.request[::-1])
            num_left -= 1
    for name, place in zip(ids, PLACES, strict=True):
        assert (await ledger.read("ann", name)).result == submission(*place).request[::-1]


def check_promises(engine: Engine, folder: Path, promised: dict[str, list[str]]) -> None:
    with engine.connect() as connection:
        if engine.dialect.name == "sqlite":
            assert connection.execute(text("PRAGMA integrity_check")).scalar_one() == "ok"
        states = {row.id: row.state for row in connection.execute(select(tables.futures.c.id, tables.futures.c.state))}
    assert set(promised["accepted"]) <= set(states)
    assert all(states[name] == "done" for name in promised["finished"])
    writer = Writer(engine)
    try:
        files = Files(folder / "bodies")
        ledger = Ledger(engine, writer, files)
        asyncio.run(serve_the_rest(ledger))
    finally:
        writer.close()
    with engine.connect() as connection:
        rows = connection.execute(select(tables.futures.c.lane, tables.futures.c.seq)).all()
    assert Counter(map(tuple, rows)) == Counter((f"lane {lane}", seq) for lane, seq in PLACES)
    assert not [path for path in files.folder.iterdir() if path.name.startswith(".tmp-")]


@pytest.mark.parametrize("point", LEDGER_POINTS)
def test_a_crash_at_each_point_breaks_no_promise(
    url: str, opened: Callable[[], Engine], tmp_path: Path, point: str
) -> None:
    victim = start(url, tmp_path, f"{point}:5")
    output, _ = victim.communicate(timeout=60)
    assert victim.returncode == -signal.SIGKILL, "the process never came to that point"
    check_promises(opened(), tmp_path, promises(output))


@pytest.mark.parametrize("seed", range(3))
def test_a_crash_at_any_moment_breaks_no_promise(tmp_path: Path, seed: int) -> None:
    from smelt.storage.database import open_database

    url = sqlite_url(tmp_path / "smelt.db")
    victim = start(url, tmp_path, "-")
    assert victim.stdout is not None
    num_lines = random.Random(seed).randrange(1, 2 * len(PLACES))
    output = "".join(victim.stdout.readline() for _ in range(num_lines))
    victim.kill()
    output += victim.stdout.read()
    victim.stdout.close()
    assert victim.wait() == -signal.SIGKILL
    engine = open_database(url)
    check_promises(engine, tmp_path, promises(output))
    engine.dispose()


def trace(tmp_path: Path) -> str:
    """One letter per system call: a word's first letter where it is said, F where the disk is waited for."""
    if shutil.which("strace") is None:
        pytest.skip("strace is absent")
    log = tmp_path / "trace"
    command = ["strace", "-f", "-e", "trace=fsync,fdatasync,write", "-o", str(log), sys.executable, str(VICTIM)]
    command += [sqlite_url(tmp_path / "smelt.db"), str(tmp_path / "bodies"), "slowly"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode and "ptrace" in done.stderr:
        pytest.skip(f"not on this platform: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    calls = []
    for line in log.read_text().splitlines():
        said = re.search(r'write\(1, "(\w)\w+\\n"', line)
        if said:
            calls.append(said[1])
        # A call that another thread's interrupted is done where it resumes.
        elif re.search(r"f(data)?sync(\(| resumed).* = 0", line):
            calls.append("F")
    return "".join(calls)


def test_an_answer_waits_for_the_disk_and_a_grant_does_not(tmp_path: Path) -> None:
    calls = trace(tmp_path)
    # Each word begins with another letter but asking and answered, which take turns.
    rounds = re.findall(r"a(F*)a(F*)g(F*)k", calls)
    assert len(rounds) == 5, calls
    accepting, granting, finishing = zip(*rounds, strict=True)
    assert all(accepting), calls
    assert all(finishing), calls
    assert not any(granting), calls
    # The fourth body is a file: it, its folder, and then the row.
    assert list(map(len, accepting)) == [1, 1, 1, 3, 1], calls
