"""Two ranks of this machine: `smelt train` as torchrun starts it, or a function that each calls."""

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

from smelt.training.parallel import describe_rank


def train_on_two_ranks(flags: list[str], home: Path, **variables: str) -> None:
    """Run it to its end; where it fails, say what the ranks said."""
    ranks = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "SMELT_HOME": str(home), **variables}
    done = subprocess.run(
        [*ranks, "-m", "smelt", "train", *flags], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"


def on_two_ranks(folder: Path, work: Callable[..., object], *arguments: object) -> list[object]:
    """What `work(*arguments)` returns in each of two processes that are told who they are; None of one that died."""
    context = multiprocessing.get_context("spawn")
    processes, answers = [], []
    for rank in range(2):
        receiver, sender = context.Pipe(duplex=False)
        given = (rank, (folder / "meeting").as_uri(), work, arguments, sender)
        process = context.Process(target=_rank_main, args=given)
        process.start()
        sender.close()
        processes.append(process)
        answers.append(receiver)
    heard = [_receive(answer) for answer in answers]
    for process in processes:
        process.join(60)
        assert process.exitcode is not None
    (folder / "meeting").unlink(missing_ok=True)
    return heard


def _rank_main(
    rank: int, rendezvous: str, work: Callable[..., object], arguments: tuple[object, ...], answer: Connection
) -> None:
    describe_rank(rank, 2, rendezvous)
    answer.send(work(*arguments))


def _receive(answer: Connection) -> object:
    try:
        return answer.recv() if answer.poll(120) else None
    except EOFError:
        return None
