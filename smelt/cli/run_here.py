"""A run in the foreground: in this process, or on several ranks of this machine; shows it, and computes nothing."""

import asyncio
import multiprocessing
import signal
from functools import partial
from typing import TYPE_CHECKING

import click
import msgspec

from smelt.run_configs import RunConfig, newest_checkpoint, out_dir_of
from smelt.settings import is_rank, load_settings

if TYPE_CHECKING:
    from smelt.training.metrics import RunSummary
    from smelt.transport.messages import Result


def run_here(config: RunConfig) -> "RunSummary":
    """Train to the end, or until Ctrl-C, and show it. Raises what the config's recipe raises.

    Several ranks are processes of their own unless torchrun has started them; where one dies, all go on from the last
    checkpoint.
    """
    if (config.ranks > 1 or load_settings().launcher != "local") and not is_rank():
        return _summary_of(asyncio.run(_on_ranks(config)), config)
    return _run_shown(config)


def say_what_next(summary: "RunSummary", command: str, usage: str) -> None:
    """After the end: how the run goes on with `command`, or how its model is used."""
    if summary.stop_reason == "interrupted":
        click.echo(f"continue with: {command} --init-from resume --out-dir {summary.out_dir}", err=True)
        raise click.exceptions.Exit(130)
    if summary.stop_reason != "eval_only":
        click.echo(f"{usage} {summary.out_dir}", err=True)


def _run_shown(config: RunConfig) -> "RunSummary":
    from smelt.cli.data_progress import data_progress
    from smelt.cli.train_display import training_display
    from smelt.library import run

    with data_progress() as progress, training_display(config) as display:
        return run(config, [display], progress)


async def _on_ranks(config: RunConfig) -> "Result | None":
    """What came of it; None where the ranks only died. KeyboardInterrupt where they were stopped too early to save."""
    from smelt.cluster.launchers import LAUNCHERS, Lives
    from smelt.cluster.ranks import Ranks
    from smelt.cluster.trainer import PRELOADED

    multiprocessing.set_forkserver_preload(list(PRELOADED))
    out_dir = out_dir_of(config)
    again = config.replace(out_dir=str(out_dir), init_from="resume")
    num_lives = 0

    def launch() -> Ranks:
        nonlocal num_lives
        num_lives += 1
        goes_on = num_lives > 1 and newest_checkpoint(out_dir) is not None
        return LAUNCHERS[load_settings().launcher](partial(rank_work, again if goes_on else config), config.ranks)

    lives = Lives(launch, lambda: newest_checkpoint(out_dir), patience_s=None)
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, lives.interrupt)
    result = await lives.result()
    if lives.is_interrupted and (result is None or result.failure is not None):
        raise KeyboardInterrupt
    return result


def rank_work(config: RunConfig) -> "Result":
    """What each rank does; the first one shows the run."""
    from smelt.cluster.trainer import result_from
    from smelt.library import run
    from smelt.training.parallel import read_ranks

    is_main = read_ranks(config.ranks).is_main
    return result_from(lambda: _run_shown(config) if is_main else run(config))


def _summary_of(result: "Result | None", config: RunConfig) -> "RunSummary":
    from smelt.cluster.launchers import gave_up
    from smelt.errors import TrainingError
    from smelt.training.metrics import RunSummary
    from smelt.transport.failures import error_of

    if result is None:
        raise TrainingError(gave_up(out_dir_of(config)))
    if result.failure is not None:
        raise error_of(result.failure)
    return msgspec.msgpack.decode(result.body, type=RunSummary)
