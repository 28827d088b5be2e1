"""Data-parallel ranks as torchrun, SLURM or nobody starts them; knows no model, no data and no optimizer."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from smelt.errors import ConfigError

TIMEOUT = timedelta(seconds=120)  # a lost rank ends the others instead of leaving them waiting


@dataclass(frozen=True, slots=True)
class Ranks:
    """Who this process is among those that train one model together."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1

    @property
    def is_main(self) -> bool:
        """Rank 0 alone logs and writes."""
        return self.rank == 0

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
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def agree_on(self, flag: bool, device: torch.device) -> bool:
        """True on every rank as soon as one says so."""
        return bool(self.sum_(torch.tensor(float(flag), device=device)) > 0)

    def wait_for_main(self) -> None:
        """Return when rank 0 has come here too."""
        if self.world_size > 1:
            dist.barrier()


def read_ranks() -> Ranks:
    """The ranks that torchrun describes in the environment; a single one without it."""
    return Ranks(
        rank=int(os.environ.get("RANK", "0")),
        world_size=int(os.environ.get("WORLD_SIZE", "1")),
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
        local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
    )


@contextmanager
def join(ranks: Ranks, device: torch.device) -> Iterator[None]:
    """Connect the ranks while the block runs: NCCL between GPUs, gloo between CPUs."""
    if ranks.world_size == 1:
        yield
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=TIMEOUT, rank=ranks.rank, world_size=ranks.world_size)
    try:
        yield
        dist.barrier()  # who leaves while another still talks to it is aborted on its way out
    finally:
        dist.destroy_process_group()


def threads_per_rank(ranks: Ranks, asked: int | None) -> int:
    """CPU threads of this process: what was asked for, or an equal share of the machine's cores."""
    return asked or max(1, num_cores() // ranks.local_world_size)


def num_cores() -> int:
    """Cores that this process may use (macOS does not say, so all of them there)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
