"""The preparation of data as people watch it: a bar per stage on a terminal, a seldom line elsewhere."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from smelt.data.sources import Progress


@contextmanager
def data_progress() -> "Iterator[Progress]":
    """A bar with rate and time left on a terminal; elsewhere a line every ten seconds."""
    from rich.progress import BarColumn, DownloadColumn, TaskID, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bars

    from smelt.cli.console import progress_console

    console = progress_console()
    if not console.is_terminal:
        yield _print_seldom()
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Bars(*columns, TimeRemainingColumn(), console=console) as bars:
        tasks: dict[str, TaskID] = {}

        def report(stage: str, num_done: int, num_total: int | None) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=num_total)
            bars.update(tasks[stage], completed=num_done)

        yield report


def _print_seldom() -> "Progress":
    last_printed = time.monotonic()

    def report(stage: str, num_done: int, num_total: int | None) -> None:
        nonlocal last_printed
        if time.monotonic() - last_printed > 10:
            last_printed = time.monotonic()
            of_total = f" of {num_total / 1e6:,.0f}" if num_total else ""
            click.echo(f"{stage}: {num_done / 1e6:,.0f}{of_total} MB", err=True)

    return report
