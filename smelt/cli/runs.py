"""`smelt runs`: list, show, follow, cancel and resume runs; prints, the work is in `control.runs` and the server.

While a server runs it is asked, for it knows what waits; otherwise the home folder tells. Logs lie in files.
"""

import time
from pathlib import Path
from typing import Any

import click

from smelt.errors import NotFound, Unavailable
from smelt.settings import Settings, load_settings

FOLLOW_SECONDS = 0.3  # between two looks at a log
PIPE_WIDTH = 1000  # characters: a program that reads the list wants a line for each run
NUMBERS = ("step", "loss", "best val", "tokens/s")

EXAMPLES = """\b
Examples:
  smelt runs ls
  smelt runs show run-0123456789ab
  smelt runs logs run-0123456789ab --follow
  smelt runs cancel run-0123456789ab
  smelt runs resume run-0123456789ab

A run may be named by its id, the beginning of it, or the name of its folder."""


@click.group(epilog=EXAMPLES)
def command() -> None:
    """List, show, follow, cancel and resume runs."""


@command.command("ls")
def list_command() -> None:
    """List every run of this home folder, newest first."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    runs = known_runs(load_settings())
    if not runs:
        click.echo("no runs yet; start one: smelt train --data-path FILE", err=True)
        return
    rows = [list_row(run) for run in runs]
    table = Table(box=None, pad_edge=False)
    for heading in rows[0]:
        table.add_column(heading, justify="right" if heading in NUMBERS else "left", no_wrap=heading == "id")
    for row in rows:
        table.add_row(*map(escape, row.values()))
    console = Console()
    if not console.is_terminal:
        console.width = PIPE_WIDTH
    console.print(table)


@command.command("show", epilog="\b\nExample:\n  smelt runs show run-0123456789ab")
@click.argument("run")
def show_command(run: str) -> None:
    """Show how RUN stands, its checkpoints, its config, and the command that trains the same again."""
    from smelt.control.runs import Runs

    settings = load_settings()
    status = find_run(run, settings)
    runs = Runs(settings.runs)
    details = runs.show(status["id"])
    for name, value in list_row(status).items():
        click.echo(f"{name:<12}{value}")
    click.echo(f"{'recipe':<12}{status['recipe']}\n{'owner':<12}{status['owner']}\n{'folder':<12}{status['out_dir']}")
    if status["reason"]:
        click.echo(f"{'reason':<12}{status['reason']}")
    for checkpoint in runs.checkpoints(status["id"]):
        marks = [mark for mark, holds in (("best", checkpoint.is_best), ("last", checkpoint.is_last)) if holds]
        size = f"{checkpoint.num_bytes / 1e6:,.1f} MB"
        click.echo(f"{'checkpoint':<12}{checkpoint.path} ({', '.join([size, *marks])})")
    click.secho("\nconfig", bold=True)
    click.echo(details.config_yaml.rstrip())
    click.secho("\nthe same again, into a folder of its own", bold=True)
    click.echo(details.command_line)


@command.command("logs", epilog="\b\nExample:\n  smelt runs logs run-0123456789ab --follow")
@click.argument("run")
@click.option("--lines", "-n", default=200, show_default=True, help="How many of the last lines.")
@click.option("--follow", "-f", is_flag=True, help="Go on until the run ends; Ctrl-C ends only the looking.")
def logs_command(run: str, lines: int, follow: bool) -> None:
    """Print what RUN has logged."""
    from smelt.configs import RUN_LOG
    from smelt.control.run_metrics import LineFile, text_of

    settings = load_settings()
    status = find_run(run, settings)
    file = LineFile(Path(status["out_dir"]) / RUN_LOG)
    for line in text_of((file.read() or [])[-lines:]):
        click.echo(line)
    while follow and status["state"] in ("queued", "running"):
        time.sleep(FOLLOW_SECONDS)
        status = find_run(status["id"], settings)  # before the file: so its last lines are there when it has ended
        for line in text_of(file.read() or file.read() or []):
            click.echo(line)


@command.command("cancel", epilog="\b\nExample:\n  smelt runs cancel run-0123456789ab")
@click.argument("run")
def cancel_command(run: str) -> None:
    """Have the server take back RUN, or stop it after its step, with a checkpoint."""
    change(run, "cancel", "one that was started in a terminal is stopped there with Ctrl-C")


@command.command("resume", epilog="\b\nExample:\n  smelt runs resume run-0123456789ab")
@click.argument("run")
def resume_command(run: str) -> None:
    """Have the server go on with RUN from its last checkpoint, after it was cancelled, has failed or was lost."""
    change(run, "resume", "or go on here: smelt train --init-from resume --out-dir FOLDER")


def change(run: str, verb: str, otherwise: str) -> None:
    """Ask the running server, and say how the run stands now. Unavailable where no server runs."""
    from smelt.cli.running_server import running_server

    settings = load_settings()
    run_id = find_run(run, settings)["id"]
    with running_server(settings) as server:
        if server is None:
            raise Unavailable(f"no server runs in {settings.home}; start one: smelt serve; {otherwise}")
        status = server.ask(f"/v1/runs/{run_id}/{verb}", "POST")
    words = {"running": "is stopping, with a checkpoint" if verb == "cancel" else "is running"}
    click.echo(f"{run_id} {words.get(status['state'], 'is ' + status['state'])}", err=True)


def known_runs(settings: Settings) -> list[dict[str, Any]]:
    """Every run as the server lists it, or as its folder tells while no server runs."""
    from dataclasses import asdict

    from smelt.cli.running_server import running_server
    from smelt.control.runs import Runs

    with running_server(settings) as server:
        if server is not None:
            found: list[dict[str, Any]] = server.ask("/v1/runs")["data"]
            return found
    return [asdict(status) for status in Runs(settings.runs).all()]


def find_run(name: str, settings: Settings) -> dict[str, Any]:
    """The run of that id, or the newest whose id begins so or whose folder is called so. NotFound."""
    runs = known_runs(settings)
    for matches in (
        [run for run in runs if run["id"] == name],
        [run for run in runs if run["name"] == Path(name).name],
        [run for run in runs if run["id"].startswith(name) or run["id"].startswith(f"run-{name}")],
    ):
        if matches:
            return matches[0]
    raise NotFound(f"there is no run {name!r}; see `smelt runs ls`")


def list_row(run: dict[str, Any]) -> dict[str, str]:
    """What `ls` says of a run, by heading."""
    return {
        "id": run["id"],
        "name": "" if run["name"] == run["id"] else run["name"],
        "state": run["state"],
        "step": f"{run['step']:,} of {run['max_iters']:,}" if run["max_iters"] else f"{run['step']:,}",
        "loss": _loss(run["loss"]),
        "best val": _loss(run["best_val_loss"]),
        "tokens/s": f"{run['tokens_per_second']:,.0f}" if run["tokens_per_second"] else "",
        "started": time.strftime("%Y-%m-%d %H:%M", time.localtime(run["started"] or run["created"])),
    }


def _loss(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
