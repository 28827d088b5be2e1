"""Sums and collections over ranks of one machine, by memory that they share; knows no model, no backend, no rendezvous.

gloo takes a third of a millisecond to more than one for a handful of numbers, because every word wakes threads of both
ranks; a small model's whole step takes less. Here a rank writes into its own slot, counts its counter up, and looks at
the others' counters until they have come as far.

A slot has two halves, used in turns. Whoever writes into a half again has met the others since they read it.
"""

import fcntl
import mmap
import os
import platform
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from smelt.errors import LostRank

MEMORY_FOLDER = "/dev/shm"
HALF_BYTES = 8 * 2**20
LINE_BYTES = 64  # counters are not neighbours: a core that writes one takes its whole line from the others
SMALL_BYTES = 2**16  # up to which each rank adds up all of it, instead of its part for everybody
EAGER_S, PAUSE_S = 0.01, 0.0002  # how long a rank looks without pause, and how it looks after that
ALIVE_S = 0.5  # between two looks at whether the others live


def is_possible(num_ranks: int, num_here: int) -> bool:
    """Whether all ranks are here, on Linux, and stores of one core are seen by others in their order, as on x86."""
    return 1 < num_ranks == num_here and (platform.system(), platform.machine()) == ("Linux", "x86_64")


def create_memory(num_ranks: int) -> Path:
    """A file of zeros for so many ranks: in memory, or where that has too little room, as in containers, on disk."""
    num_bytes = num_ranks * (LINE_BYTES + 2 * HALF_BYTES)
    try:
        return _allocated(num_bytes, MEMORY_FOLDER)
    except OSError:
        return _allocated(num_bytes, None)


def _allocated(num_bytes: int, folder: str | None) -> Path:
    handle, name = tempfile.mkstemp(prefix="smelt-ranks-", dir=folder)
    try:
        os.posix_fallocate(handle, 0, num_bytes)  # else a full disk shows itself as a signal, later
    except OSError:
        os.unlink(name)
        raise
    finally:
        os.close(handle)
    return Path(name)


def lost_rank(reason: str) -> LostRank:
    """The error of whoever waits for another rank in vain."""
    return LostRank(
        f"another rank has ended or cannot be reached ({reason}); what it said last tells why. "
        f"Continue from the last checkpoint with --init-from resume"
    )


class SharedMemory:
    """One rank's view of the memory that all ranks of a machine share. All of them call the same, in the same order."""

    def __init__(self, rank: int, num_ranks: int, path: Path, timeout_s: float) -> None:
        """`path` is a file of `create_memory`, which may be removed when every rank has called this."""
        self.rank = rank
        self.num_ranks = num_ranks
        self.timeout_s = timeout_s
        self._file = path.open("r+b")
        fcntl.lockf(self._file, fcntl.LOCK_EX, 1, rank)  # held as long as this process lives
        self._memory = mmap.mmap(self._file.fileno(), 0)
        words = torch.frombuffer(self._memory, dtype=torch.int64, count=num_ranks * LINE_BYTES // 8)
        # Of each rank how often it has come, and the numbers that it brought to the last two meetings.
        self._lines = words.view(num_ranks, -1).numpy()
        self._num_meetings = 0
        self._half = 0

    def close(self) -> None:
        """Leave; the memory goes with the last rank."""
        self._file.close()

    def sum_(self, tensor: Tensor) -> None:
        """Add the ranks' tensors in place, in the order of the ranks: each has the same bits. LostRank without one."""
        flat, most = tensor.view(-1), HALF_BYTES // tensor.element_size()
        for part in (flat[first : first + most] for first in range(0, len(flat), most)):
            halves = self._half_of_each(part.dtype, len(part))
            halves[self.rank].copy_(part)
            self._meet()
            if part.nbytes <= SMALL_BYTES:
                part.copy_(added_up(halves))
                continue
            shares = [half.tensor_split(self.num_ranks) for half in halves]
            shares[self.rank][self.rank].copy_(added_up([each[self.rank] for each in shares]))
            self._meet()
            for rank, share in enumerate(part.tensor_split(self.num_ranks)):
                share.copy_(shares[rank][rank])

    def gather(self, rows: Tensor) -> list[Tensor]:
        """Each rank's rows (R, C), of which each may have another number. LostRank without one."""
        most, width = HALF_BYTES // (rows.element_size() * rows.shape[1]), rows.shape[1]
        nums = self._meet(len(rows))
        received: list[list[Tensor]] = [[rows[:0]] for _ in nums]
        for first in range(0, max(nums), most):
            here = [min(max(num - first, 0), most) for num in nums]
            halves = self._half_of_each(rows.dtype, most * width)
            halves[self.rank][: here[self.rank] * width].copy_(rows[first : first + most].reshape(-1))
            self._meet()
            for pieces, half, num in zip(received, halves, here, strict=True):
                pieces.append(half[: num * width].clone().view(num, width))
        return [torch.cat(pieces) for pieces in received]

    def _half_of_each(self, dtype: torch.dtype, count: int) -> list[Tensor]:
        """So many numbers of every rank's slot, in the half whose turn it is."""
        self._half = 1 - self._half
        lines = self.num_ranks * LINE_BYTES
        firsts = [lines + (2 * rank + self._half) * HALF_BYTES for rank in range(self.num_ranks)]
        return [torch.frombuffer(self._memory, dtype=dtype, count=count, offset=first) for first in firsts]

    def _meet(self, number: int = 0) -> list[int]:
        """Return when every rank has come here, with the numbers that they bring."""
        self._num_meetings += 1
        cell = 1 + self._num_meetings % 2  # who is late still reads the one before
        self._lines[self.rank, cell] = number
        self._lines[self.rank, 0] = self._num_meetings
        for rank in range(self.num_ranks):
            self._wait_for(rank)
        return [int(line[cell]) for line in self._lines]

    def _wait_for(self, rank: int) -> None:
        counter = self._lines[rank]
        began = last_look = time.monotonic()
        while counter[0] < self._num_meetings:
            now = time.monotonic()
            if now - began < EAGER_S:
                os.sched_yield()
                continue
            time.sleep(PAUSE_S)
            if now - last_look > ALIVE_S:
                last_look = now
                self._look_after(rank, now - began)

    def _look_after(self, rank: int, waited_s: float) -> None:
        """LostRank where a rank has ended, or has not come for too long."""
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, rank)
        except OSError:  # it holds its lock, so it lives
            if waited_s > self.timeout_s:
                raise lost_rank(f"rank {rank} has not come for {waited_s:.0f} s") from None
        else:
            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, rank)
            raise lost_rank(f"rank {rank} is gone")


def added_up(tensors: Sequence[Tensor]) -> Tensor:
    """Their sum, from the first to the last."""
    total = tensors[0].clone()
    for tensor in tensors[1:]:
        total += tensor
    return total
