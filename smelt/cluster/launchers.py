"""Launchers: how the processes of a run are started and ended, and replaced when they die; knows no server, no torch.

A run's work is a picklable function that returns a `Result`; each of its ranks calls it in a process of its own. To
launch elsewhere is another `Launch`, in `LAUNCHERS`.
"""

import asyncio
import logging
import multiprocessing
import os
import shutil
import signal
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import msgspec

from smelt.cluster import trainer
from smelt.cluster.ranks import Ranks, Work, verdict
from smelt.configs import RUN_LOG
from smelt.errors import ConfigError
from smelt.transport.messages import Result

STOP_SECONDS = 10.0  # for a run's last step and its checkpoint, and for ranks that have lost another
REST_SECONDS = 1.0  # before a run that died is continued
MAX_DEATHS = 3  # of a run's processes, one time after the other, without a new checkpoint

log = logging.getLogger(__name__)


Launch = Callable[[Work, int], Ranks]  # of so many ranks


class LocalRank:
    """One process of this machine, forked from a server that has torch ready."""

    def __init__(self, work: Work, rank: int, num_ranks: int, rendezvous: str) -> None:
        context = multiprocessing.get_context("forkserver")
        self.name = f"rank {rank} of {num_ranks}"
        self._answer, self._given = context.Pipe(duplex=False)
        given = (work, rank, num_ranks, rendezvous, self._given)
        self._process = context.Process(target=trainer.main, args=given, name=self.name)
        self.ended = asyncio.Event()
        self.was_killed = False

    async def start(self) -> None:
        """Returns when it is forked, for which torch must be ready."""
        await asyncio.to_thread(self._process.start)
        self._given.close()
        asyncio.get_running_loop().add_reader(self._process.sentinel, self._note_end)

    @property
    def answer(self) -> Result | None:
        """What it had to say."""
        with suppress(EOFError):
            if self._answer.poll():
                return msgspec.msgpack.decode(self._answer.recv_bytes(), type=Result)
        return None

    @property
    def exit_code(self) -> int | None:
        """As subprocess has it: below zero is a signal."""
        return self._process.exitcode

    def signal(self, number: signal.Signals) -> None:
        """Send a signal, if there is still somebody to get it."""
        pid = self._process.pid
        if pid is not None and not self.ended.is_set():
            self.was_killed = self.was_killed or number == signal.SIGKILL
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def _note_end(self) -> None:
        asyncio.get_running_loop().remove_reader(self._process.sentinel)
        self._process.join()
        self.ended.set()


class LocalRanks:
    """Processes of this machine that meet in a file and talk over the loopback: no port is open to others."""

    def __init__(self, work: Work, num_ranks: int) -> None:
        num_cores = os.cpu_count() or 1
        if num_ranks > num_cores:
            raise ConfigError(f"ranks: {num_ranks} are more than this machine's {num_cores} cores")
        self._folder = Path(tempfile.mkdtemp(prefix="smelt-ranks-"))
        meeting = (self._folder / "meeting").as_uri()
        self._ranks = [LocalRank(work, rank, num_ranks, meeting) for rank in range(num_ranks)]
        self._started: list[LocalRank] = []
        self._was_interrupted = False

    async def start(self) -> None:
        """Fork all; where one cannot be, none is left."""
        try:
            for rank in self._ranks:
                await rank.start()
                self._started.append(rank)
        except (OSError, EOFError):
            self.kill()
            await self._all_ended()
            raise

    async def result(self) -> Result | None:
        """See `Ranks`. When one has ended the others end too, or wait for one that never comes: they get some time."""
        endings = [asyncio.create_task(rank.ended.wait()) for rank in self._started]
        await asyncio.wait(endings, return_when=asyncio.FIRST_COMPLETED)
        killing = asyncio.get_running_loop().call_later(STOP_SECONDS, self.kill)
        await self._all_ended()
        killing.cancel()
        answers = [(rank.answer, rank.was_killed) for rank in self._started]
        for rank, (answer, was_killed) in zip(self._started, answers, strict=True):
            if answer is None and not was_killed and not self._was_interrupted:
                log.warning("%s died: exit code %s", rank.name, rank.exit_code)
        return verdict(answers)

    def interrupt(self) -> None:
        """See `Ranks`."""
        self._was_interrupted = True
        for rank in self._started:
            rank.signal(signal.SIGINT)

    def kill(self) -> None:
        """See `Ranks`."""
        for rank in self._started:
            rank.signal(signal.SIGKILL)

    async def _all_ended(self) -> None:
        for rank in self._started:
            await rank.ended.wait()
        shutil.rmtree(self._folder, ignore_errors=True)


def ray_ranks(work: Work, num_ranks: int) -> Ranks:
    """Ranks on the hosts of a Ray cluster."""
    from smelt.cluster.ray_launcher import RayRanks  # noqa: PLC0415 it needs what is above, and an extra

    return RayRanks(work, num_ranks)


LAUNCHERS: dict[str, Launch] = {"local": LocalRanks, "ray": ray_ranks}


def gave_up(out_dir: Path) -> str:
    """What to say of a run whose processes only died."""
    return (
        f"the run's processes died {MAX_DEATHS} times without getting further; {out_dir / RUN_LOG} may say why; "
        f"continue from the last checkpoint with --init-from resume --out-dir {out_dir}"
    )


class Lives:
    """A run's processes from its start to its end: who dies is replaced, as long as the run gets further."""

    def __init__(
        self, launch: Callable[[], Ranks], how_far: Callable[[], str | None], patience_s: float | None = STOP_SECONDS
    ) -> None:
        self._launch = launch
        self._how_far = how_far  # the newest checkpoint
        self._patience_s = patience_s  # until who was interrupted is killed; None: as long as it takes
        self._now: Ranks | None = None
        self.is_interrupted = False

    async def result(self) -> Result | None:
        """What came of the run; None where it was interrupted between two lives, or died too often.

        When this is cancelled, what runs is interrupted and waited for.
        """
        num_deaths = 0
        while num_deaths < MAX_DEATHS and not self.is_interrupted:
            before = self._how_far()
            result = await self._live()
            if result is not None:
                return result
            num_deaths = num_deaths + 1 if self._how_far() == before else 1
            if not self.is_interrupted:
                await asyncio.sleep(REST_SECONDS)
        return None

    def interrupt(self) -> None:
        """Have the run save and end; asked twice, its processes end at once, without saving."""
        self.is_interrupted = True
        if self._now is not None:
            self._now.interrupt()
            if self._patience_s is not None:
                asyncio.get_running_loop().call_later(self._patience_s, self._now.kill)

    async def _live(self) -> Result | None:
        living = asyncio.create_task(self._started_and_ended(self._launch()))
        try:
            return await asyncio.shield(living)
        except asyncio.CancelledError:
            self.interrupt()
            await living
            raise

    async def _started_and_ended(self, ranks: Ranks) -> Result | None:
        try:
            await ranks.start()
        except (OSError, EOFError) as error:
            log.warning("cannot start the processes of a run: %s", error or "the forkserver is gone")
            return None
        self._now = ranks
        if self.is_interrupted:
            self.interrupt()
        try:
            return await ranks.result()
        finally:
            self._now = None
