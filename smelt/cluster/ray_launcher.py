"""Ranks on the hosts of a Ray cluster: an actor for each keeps its process; knows no server and no training.

The cluster is that of RAY_ADDRESS, or one of our own on this machine; its processes must show the cluster's token to
each other. All hosts see the same files. Where there is no room for all ranks, as after the death of a host, there are
fewer of them: the largest part that divides the number that was asked for, so that it divides a step's rows as well.
"""

import asyncio
import logging
import multiprocessing
import os
import signal
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from smelt.cluster import trainer
from smelt.cluster.ranks import Work, verdict
from smelt.errors import MissingDependency
from smelt.settings import load_settings, show_ray_token
from smelt.transport.messages import Result

PLACE_SECONDS = 15.0  # until a smaller world is tried
RESULT_SECONDS = 10.0  # after the first rank has ended

log = logging.getLogger(__name__)


class Keeper:
    """The actor of one rank: its process lives and dies with it."""

    def __init__(self, folder: str) -> None:
        os.chdir(folder)
        self._process: Any = None
        self._answer: Any = None

    def meeting(self) -> str:
        """A URL on this host where the ranks can meet."""
        address = _ray().util.get_node_ip_address()
        with socket.socket() as free:
            free.bind((address, 0))
            return f"tcp://{address}:{free.getsockname()[1]}"

    def begin(self, work: Work, rank: int, num_ranks: int, meeting: str) -> None:
        """Start the rank's process."""
        context = multiprocessing.get_context("spawn")
        self._answer, given = context.Pipe(duplex=False)
        arguments = (work, rank, num_ranks, meeting, given)
        self._process = context.Process(target=trainer.main, args=arguments)
        self._process.start()
        given.close()

    def result(self) -> bytes | None:
        """What it had to say, once it has ended; None where it died without a word."""
        self._process.join()
        with suppress(EOFError):
            if self._answer.poll():
                return bytes(self._answer.recv_bytes())
        return None

    def signal(self, number: int) -> None:
        """Send it a signal."""
        with suppress(ProcessLookupError):
            os.kill(self._process.pid, number)


class RayRanks:
    """One life of the ranks of a run, on the hosts that Ray finds for them. Its methods are those of `Ranks`."""

    def __init__(self, work: Work, num_ranks: int) -> None:
        self._work = work
        self._num_ranks = num_ranks
        self._group: Any = None
        self._keepers: list[Any] = []
        self._was_killed = False

    async def start(self) -> None:
        """Returns when every rank's process has been started; OSError where there is no room even for one."""
        await asyncio.to_thread(self._start)

    async def result(self) -> Result | None:
        """What came of it; None where a rank or its host died."""
        try:
            return await asyncio.to_thread(self._result)
        finally:
            await asyncio.to_thread(self._leave)

    def interrupt(self) -> None:
        """Ask all to save and end."""
        self._signal(signal.SIGINT)

    def kill(self) -> None:
        """End all at once."""
        self._was_killed = True
        self._signal(signal.SIGKILL)

    def _start(self) -> None:
        ray = _connected()
        self._group = _placed(ray, self._num_ranks)
        num_ranks = len(self._group.bundle_specs)
        if num_ranks < self._num_ranks:
            log.warning("there is room for %d of %d ranks: going on with those", num_ranks, self._num_ranks)
        strategy = ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy
        environment = {"env_vars": {"SMELT_HOME": str(load_settings().home)}}
        for rank, bundle in enumerate(self._group.bundle_specs):
            actor = ray.remote(Keeper).options(
                num_cpus=bundle["CPU"],
                num_gpus=bundle.get("GPU", 0),
                max_concurrency=3,  # to be told something while its result is waited for
                runtime_env=environment,
                scheduling_strategy=strategy(self._group, placement_group_bundle_index=rank),
            )
            self._keepers.append(actor.remote(str(Path.cwd())))
        try:
            meeting = ray.get(self._keepers[0].meeting.remote())
            begun = [
                keeper.begin.remote(self._work, rank, num_ranks, meeting) for rank, keeper in enumerate(self._keepers)
            ]
            ray.get(begun)
        except ray.exceptions.RayError as error:
            self._leave()
            raise OSError(f"Ray could not start the ranks: {error}") from error

    def _result(self) -> Result | None:
        ray = _ray()
        waiting = [keeper.result.remote() for keeper in self._keepers]
        ray.wait(waiting)
        ended, late = ray.wait(waiting, num_returns=len(waiting), timeout=RESULT_SECONDS)
        answers = []
        for reference in waiting:
            was_killed = self._was_killed or reference in late
            answers.append((_answer_of(ray, reference) if reference in ended else None, was_killed))
        return verdict(answers)

    def _signal(self, number: signal.Signals) -> None:
        for keeper in self._keepers:
            keeper.signal.remote(number)

    def _leave(self) -> None:
        ray = _ray()
        for keeper in self._keepers:
            ray.kill(keeper)  # the process that it keeps ends with it
        ray.util.remove_placement_group(self._group)


def _ray() -> Any:
    try:
        import ray  # noqa: PLC0415 an extra
        import ray.util.scheduling_strategies  # noqa: PLC0415
    except ImportError:
        raise MissingDependency("launcher: ray needs Ray; install it with: pip install 'smelt[ray]'") from None
    return ray


def _connected() -> Any:
    show_ray_token()
    ray = _ray()
    if not ray.is_initialized():
        ray.init(log_to_driver=True, include_dashboard=False)
    return ray


def _placed(ray: Any, num_ranks: int) -> Any:
    """Room for all ranks, or for as many as there is room for."""
    bundle = {"CPU": 1.0, "GPU": 1.0} if ray.cluster_resources().get("GPU") else {"CPU": 1.0}
    for size in (size for size in range(num_ranks, 0, -1) if num_ranks % size == 0):
        group = ray.util.placement_group([bundle] * size)
        if group.wait(PLACE_SECONDS):
            return group
        ray.util.remove_placement_group(group)
    raise OSError("Ray has no room for a single rank")


def _answer_of(ray: Any, reference: Any) -> Result | None:
    """None where the actor, its host or its process died."""
    try:
        said = ray.get(reference)
    except ray.exceptions.RayError as error:
        log.warning("a rank's host or keeper died: %s", str(error).splitlines()[0])
        return None
    return None if said is None else msgspec.msgpack.decode(said, type=Result)
