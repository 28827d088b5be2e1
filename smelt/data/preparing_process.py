"""A dataset made in a process of its own, for a server that must answer others meanwhile; knows no HTTP and no ledger.

    python -m smelt.data.preparing_process    reads one Order from its input, writes a Report a line to its output

It ends when its input ends, so that it never outlives its starter, and may be killed at any moment: what it has not
finished is no dataset. Its starter may be asked by anybody, so it fetches from public machines only, and leaves some of
the disk to others.
"""

import os
import select
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path
from typing import IO

import msgspec

from smelt import errors
from smelt.data.documents import Source
from smelt.data.preparation import Maker, PrepareOptions, prepare
from smelt.data.public_web import urlopen
from smelt.data.readers import input_file
from smelt.data.sources import Origin, Progress, builtin_source, hub_source, source_of, url_source
from smelt.errors import InvalidInput, OutOfSpace, SmeltError

NICENESS = 5  # somebody may wait for an answer beside it
SPARE_BYTES = 2**30  # of the disk, which data that somebody sends must not fill
REPORT_SECONDS = 0.2
LOOK_SECONDS = 0.5  # between two questions whether anybody still wants it


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """What to make of what. A `file` is read in place of the source, which then is only what to call it."""

    datasets_folder: str
    name: str
    source: str
    file: str | None = None
    tokenizer: str
    val_fraction: float
    block_size: int
    column: str
    errors: str
    owner: str
    job: str


class Report(msgspec.Struct, frozen=True, omit_defaults=True):
    """How far it is, or the error that it ended with. The last one has neither a stage nor an error."""

    stage: str = ""
    num_done: int = 0
    num_total: int | None = None
    error: str | None = None
    message: str = ""
    param: str | None = None


def prepare_apart(order: Order, progress: Progress) -> None:
    """Make a dataset in another process. Raises what `prepare` raises, and whatever `progress` does, which ends it."""
    process = subprocess.Popen(
        [sys.executable, "-m", __spec__.name],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,
        process_group=0,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(msgspec.json.encode(order) + b"\n")
        _follow(process.stdout, progress)
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def _follow(reports: IO[bytes], progress: Progress) -> None:
    poll = select.poll()
    poll.register(reports, select.POLLIN)
    last, rest = Report(), b""
    while True:
        if poll.poll(LOOK_SECONDS * 1000):
            read = reports.read(2**16)
            if not read:
                raise SmeltError("the process that prepared the data died, perhaps for want of memory; try again")
            *lines, rest = (rest + read).split(b"\n")
            for line in lines:
                last = msgspec.json.decode(line, type=Report)
                if _is_end(last):
                    return
        progress(last.stage, last.num_done, last.num_total)


def _is_end(report: Report) -> bool:
    """Whether it is done; raises the error that it ended with."""
    if report.error is None:
        return not report.stage
    raised = getattr(errors, report.error)
    raise raised(report.message, report.param) if issubclass(raised, InvalidInput) else raised(report.message)


def main() -> None:
    """Do what the first line of the input asks for."""
    os.nice(NICENESS)
    order = msgspec.json.decode(sys.stdin.buffer.readline(), type=Order)
    threading.Thread(target=_end_with_input, daemon=True).start()
    with tempfile.TemporaryDirectory(prefix="smelt-") as empty:
        os.chdir(empty)  # no folder here could be mistaken for a dataset of the hub
        _say(_report_of(order))


def _end_with_input() -> None:
    sys.stdin.buffer.read()
    os._exit(1)


def _say(report: Report) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(report) + b"\n")
    sys.stdout.buffer.flush()


def _report_of(order: Order) -> Report:
    try:
        _make(order)
    except SmeltError as error:
        return Report(error=type(error).__name__, message=str(error), param=getattr(error, "param", None))
    return Report()


def _make(order: Order) -> None:
    folder = Path(order.datasets_folder)
    prepare(
        Origin(order.source, partial(_open, order)),
        folder,
        order.name,
        tokenizer=order.tokenizer,
        options=PrepareOptions(
            val_fraction=order.val_fraction,
            block_size=order.block_size,
            column=order.column,
            errors="skip" if order.errors == "skip" else "strict",
        ),
        progress=_telling(folder),
        maker=Maker(order.owner, order.job),
    )


def _open(order: Order, scratch: Path, progress: Progress) -> Source:
    if order.file is not None:
        return source_of([input_file(Path(order.file), label=order.source, name=order.source)])
    scheme = order.source.partition(":")[0]
    if scheme in ("http", "https"):
        return url_source(order.source, scratch, progress, urlopen)
    return {"hf": hub_source, "builtin": builtin_source}[scheme](order.source, scratch, progress)


def _telling(folder: Path) -> Progress:
    """Progress that is told a few times a second, and ends the work before the disk is full."""
    next_time = 0.0

    def progress(stage: str, num_done: int, num_total: int | None) -> None:
        nonlocal next_time
        if time.monotonic() < next_time:
            return
        next_time = time.monotonic() + REPORT_SECONDS
        if shutil.disk_usage(folder).free < SPARE_BYTES:
            raise OutOfSpace(f"less than {SPARE_BYTES >> 20:,} MiB are left on the server's disk; nothing was added")
        _say(Report(stage, num_done, num_total))

    return progress


if __name__ == "__main__":
    main()
