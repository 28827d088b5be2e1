"""One rank of a run in a process of its own, forked for it by a launcher; knows no server and no connection.

It stops cleanly on SIGINT, with a checkpoint, and never outlives the launcher. What a run that was granted would have
shown on a terminal goes to `log.txt` in its folder.
"""

import logging
import multiprocessing
import os
from collections.abc import Callable
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from smelt.cluster.lifeline import die_at_end_of_file
from smelt.configs import RUN_LOG
from smelt.control.run_folders import read_entry
from smelt.control.run_memory import wait_for_memory
from smelt.control.run_metrics import note
from smelt.errors import SmeltError, TrainingError
from smelt.library import run, run_config
from smelt.run_configs import RunConfig, newest_checkpoint, out_dir_of
from smelt.settings import load_settings
from smelt.transport.failures import failure_of
from smelt.transport.messages import Grant, Result, TrainRequest

if TYPE_CHECKING:
    from smelt.training.metrics import RunSummary

# What the launcher's forkserver imports, so that each run finds it ready.
PRELOADED = ("smelt.cluster.trainer", "smelt.training.recipes")

log = logging.getLogger(__name__)


def main(work: Callable[[], Result], rank: int, num_ranks: int, rendezvous: str, answer: Connection) -> None:
    """Do one rank's work, and send its encoded Result.

    It leads a process group: Ctrl-C in a terminal reaches the launcher alone, which tells all ranks, each once.
    """
    launcher = multiprocessing.parent_process()
    assert launcher is not None, "a launcher starts this"
    os.setpgid(0, 0)
    die_at_end_of_file(launcher.sentinel)
    from smelt.training.parallel import describe_rank  # noqa: PLC0415 torch: launchers import this module too

    describe_rank(rank, num_ranks, rendezvous)
    answer.send_bytes(msgspec.msgpack.encode(work()))


def result_of(grant: Grant, unloaded: tuple[str, ...] = ()) -> Result:
    """Train what was granted, and put into a Result what came of it. `unloaded`: models that have made way for it."""

    def train() -> "RunSummary":
        request = msgspec.msgpack.decode(grant.body, type=TrainRequest)
        log_to(Path(request.config["out_dir"]))
        config = run_config(values_of(request))
        wait_for_room(config, unloaded)
        return run(config)

    return result_from(train, grant.future_id, grant.epoch)


def result_from(train: Callable[[], "RunSummary"], future_id: str = "", epoch: int = 0) -> Result:
    """What a function that trains returns or raises, as a Result."""
    try:
        summary = train()
    except KeyboardInterrupt:
        error: Exception = TrainingError("the run was stopped before its first step")
    except SmeltError as mistake:
        log.info("error: %s", mistake)
        error = mistake
    except Exception as bug:
        log.exception("the run ends here, because of a bug")
        error = bug
    else:
        return Result(future_id, epoch, body=msgspec.msgpack.encode(asdict(summary)))
    return Result(future_id, epoch, failure=failure_of(error))


def wait_for_room(config: RunConfig, unloaded: tuple[str, ...]) -> None:
    """Return when there is the memory that a run needs, which workers of this machine may hold until now."""
    made_way = f"the worker has unloaded {', '.join(unloaded)}" if unloaded else ""
    if made_way:
        log.info("%s: this run needs the memory", made_way)
    from smelt.models.devices import pick_device  # noqa: PLC0415 torch: launchers import this module too

    def tell(lack: str) -> None:
        reason = f"{lack}; {made_way}" if made_way else lack
        log.info("%s", reason)
        note(out_dir_of(config), "waiting", reason)

    wait_for_memory(config, load_settings(), str(pick_device(config.device)), tell)


def values_of(request: TrainRequest) -> dict[str, Any]:
    """The config's values; where this run has been trained before, it goes on from its last checkpoint."""
    out_dir = Path(request.config["out_dir"])
    entry = read_entry(out_dir)
    if entry is not None and entry.id == request.run_id and newest_checkpoint(out_dir) is not None:
        return {**request.config, "init_from": "resume"}
    return request.config


def log_to(out_dir: Path) -> None:
    """From now on, what this process writes to its terminal goes to the run's log."""
    out_dir.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(out_dir / RUN_LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for terminal in (1, 2):
        os.dup2(descriptor, terminal)
    os.close(descriptor)
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
