"""Data-parallel ranks as our launcher, torchrun, SLURM or nobody starts them; knows no model and no optimizer."""

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from itertools import zip_longest
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from smelt.errors import ConfigError
from smelt.training.shared_memory import SharedMemory, create_memory, is_possible, lost_rank

TIMEOUT = timedelta(seconds=120)  # a lost rank ends the others instead of leaving them waiting
PATIENCE = timedelta(days=1)  # while rank 0 downloads and tokenizes; whoever starts ranks ends them where one dies
T = TypeVar("T")
RENDEZVOUS = "SMELT_RENDEZVOUS"  # where ranks of our own launcher meet; torchrun's meet where its variables say


@dataclass(frozen=True, slots=True)
class Ranks:
    """Who this process is among those that train one model together."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    sharding: str = "none"  # as the run's config has it

    @property
    def is_main(self) -> bool:
        """Rank 0 alone logs and writes."""
        return self.rank == 0

    @property
    def in_step(self) -> bool:
        """Whether every pass is one of all ranks, because each holds only a part of the weights or of the optimizer."""
        return self.world_size > 1 and self.sharding != "none"

    def passes(self, batches_of: Callable[[int], Iterable[T]]) -> Iterator[tuple[T, bool]]:
        """The batches of this rank, and whether they count; `batches_of` gives those of any rank.

        The first rank has the most. Where all must be in step, who has fewer goes through the first one's again, and
        these do not count.
        """
        if not self.in_step or self.is_main:
            yield from ((batch, True) for batch in batches_of(self.rank))
            return
        for own, of_first in zip_longest(batches_of(self.rank), batches_of(0)):
            assert of_first is not None, "rows are dealt out beginning with the first rank"
            yield (of_first, False) if own is None else (own, True)

    def rows(self, global_rows: int) -> slice:
        """This rank's share of a global batch. ConfigError where it cannot be shared equally."""
        if global_rows % self.world_size:
            raise ConfigError(
                f"batch_size x gradient_accumulation_steps = {global_rows} rows cannot be shared equally by "
                f"{self.world_size} ranks; make it a multiple of {self.world_size}"
            )
        share = global_rows // self.world_size
        return slice(self.rank * share, (self.rank + 1) * share)

    def sum_(self, tensor: Tensor) -> Tensor:
        """Add the ranks' tensors in place, in the tensor's own dtype."""
        if (shared := shared_memory()) is not None:
            shared.sum_(tensor)
        elif self.world_size > 1:
            with lost_ranks_explained():
                dist.all_reduce(tensor)
        return tensor

    def agree_on(self, flag: bool, device: torch.device) -> bool:
        """True on every rank as soon as one says so."""
        return bool(self.sum_(torch.tensor(float(flag), device=device)) > 0)

    def wait_for_main(self) -> None:
        """Return when every rank has come here."""
        if self.world_size > 1:
            with lost_ranks_explained():
                dist.barrier(dist.new_group(backend="gloo", timeout=PATIENCE))


@contextmanager
def lost_ranks_explained(*, among_others: bool = False) -> Iterator[None]:
    """LostRank in place of what the backends raise when another rank does not answer.

    `among_others`: the block does more than to talk to other ranks, so a RuntimeError may be about something else.
    """
    try:
        yield
    except RuntimeError as error:
        if among_others and not is_of_backend(error):
            raise
        reason = str(error).strip().splitlines()[0][:200]
        raise lost_rank(reason) from error


def is_of_backend(error: RuntimeError) -> bool:
    """Whether it is about talking to other ranks: NCCL and the stores have a class of their own, gloo its name."""
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()


def describe_rank(rank: int, num_ranks: int, rendezvous: str) -> None:
    """Tell this process who it is, in torchrun's variables.

    `rendezvous` is where the ranks meet. A `file://` URL: all are on this machine, and talk over the loopback alone;
    neither opens a port to others. A `tcp://` URL: each is on a host of its own, or sees only its own GPU.
    """
    is_local = rendezvous.startswith("file://")
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(num_ranks), RENDEZVOUS: rendezvous}
    os.environ |= {"LOCAL_RANK": str(rank if is_local else 0), "LOCAL_WORLD_SIZE": str(num_ranks if is_local else 1)}
    if is_local:
        loopback = "lo" if sys.platform == "linux" else "lo0"
        os.environ |= {"GLOO_SOCKET_IFNAME": loopback, "NCCL_SOCKET_IFNAME": loopback}


def read_ranks(num_asked: int = 1, sharding: str = "none") -> Ranks:
    """The ranks that torchrun or our launcher describe in the environment; a single one without them.

    ConfigError where a config asks for several and nobody has started them.
    """
    if num_asked > 1 and "WORLD_SIZE" not in os.environ:
        raise ConfigError(
            f"ranks: {num_asked} needs as many processes; start them with `smelt train --ranks {num_asked}` or torchrun"
        )
    return Ranks(
        rank=int(os.environ.get("RANK", "0")),
        world_size=int(os.environ.get("WORLD_SIZE", "1")),
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
        local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        sharding=sharding,
    )


@contextmanager
def join(ranks: Ranks, device: torch.device) -> Iterator[None]:
    """Connect the ranks while the block runs: NCCL between GPUs, gloo between CPUs."""
    if ranks.world_size == 1:
        yield
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    place = os.environ.get(RENDEZVOUS, "env://")
    with lost_ranks_explained():
        dist.init_process_group(
            backend, init_method=place, timeout=TIMEOUT, rank=ranks.rank, world_size=ranks.world_size
        )
    try:
        with _memory_shared(ranks, device):
            yield
            ranks.wait_for_main()  # who leaves while another still talks to it is aborted on its way out
    finally:
        dist.destroy_process_group()


_shared: ContextVar[SharedMemory | None] = ContextVar("shared", default=None)  # beside torch's process group


def shared_memory() -> SharedMemory | None:
    """What the ranks use instead of a backend, where they can."""
    return _shared.get()


@contextmanager
def _memory_shared(ranks: Ranks, device: torch.device) -> Iterator[None]:
    """Let ranks of one machine that compute on its processor meet in memory while the block runs."""
    if device.type != "cpu" or not is_possible(ranks.world_size, ranks.local_world_size):
        yield
        return
    with lost_ranks_explained(among_others=True):
        path = create_memory(ranks.world_size) if ranks.is_main else None
        named = [str(path)]
        dist.broadcast_object_list(named)
        shared = SharedMemory(ranks.rank, ranks.world_size, Path(named[0]), TIMEOUT.total_seconds())
        dist.barrier()
    if path is not None:
        path.unlink()
    token = _shared.set(shared)
    try:
        yield
    finally:
        _shared.reset(token)
        shared.close()


def threads_per_rank(ranks: Ranks, asked: int | None) -> int:
    """CPU threads of this process: its share of those that were asked for, or of the machine's cores."""
    return max(1, (asked or num_cores()) // ranks.local_world_size)


def num_cores() -> int:
    """Cores that this process may use (macOS does not say, so all of them there)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
