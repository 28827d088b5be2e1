"""Sums and collections in memory that two processes share, and what becomes of one whose other is gone."""

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ranks import on_two_ranks
from smelt.errors import LostRank
from smelt.training import shared_memory
from smelt.training.parallel import Ranks, join, read_ranks
from smelt.training.parallel import shared_memory as current
from smelt.training.shared_memory import HALF_BYTES, SMALL_BYTES, SharedMemory, create_memory, is_possible

SIZES = (1, 7, SMALL_BYTES // 4 + 3, HALF_BYTES // 4 + 5, 3 * HALF_BYTES // 4)  # of fp32: in one piece, and in several


def numbers(rank: int, size: int, dtype: torch.dtype) -> Tensor:
    return torch.rand(size, generator=torch.Generator().manual_seed(rank), dtype=torch.float64).to(dtype)


def rows_of(rank: int, num: int) -> Tensor:
    return numbers(rank, num * 33, torch.float32).view(num, 33)


def meet() -> object:
    """Many sums and collections one after the other; what is wrong with them, and whether memory was shared."""
    ranks = read_ranks()
    wrong = []
    with join(ranks, torch.device("cpu")):
        for round_ in range(3):
            for size in SIZES:
                for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.int64):
                    total = ranks.sum_(numbers(ranks.rank + round_, size, dtype))
                    expected = numbers(round_, size, dtype) + numbers(round_ + 1, size, dtype)
                    if not torch.equal(total, expected):
                        wrong.append(("sum", round_, size, dtype))
            for nums in ((0, 0), (0, 5), (1, 0), (100, 70_000), (200_000, 3)):
                assert (shared := current()) is not None
                found = shared.gather(rows_of(ranks.rank, nums[ranks.rank]))
                if not all(torch.equal(each, rows_of(rank, nums[rank])) for rank, each in enumerate(found)):
                    wrong.append(("gather", round_, nums))
            if not ranks.agree_on(ranks.rank == 1, torch.device("cpu")):
                wrong.append(("agree", round_))
        shared_here = current() is not None
    return wrong, shared_here, current() is None


def leave_early(how: str) -> object:
    """What the first rank is told when the other ends, or waits for longer than is allowed."""
    ranks = read_ranks()
    shared_memory.EAGER_S = 0.001
    try:
        with join(ranks, torch.device("cpu")):
            assert (shared := current()) is not None
            if ranks.rank == 1 and how == "ends":
                os._exit(1)
            if ranks.rank == 1:  # it waits for another meeting, until the first rank has gone
                shared._num_meetings = 100
                shared._wait_for(0)
            shared.timeout_s = 1.0
            ranks.sum_(torch.ones(3))
    except LostRank as error:
        return str(error)
    return "nobody was missed"


def test_two_ranks_add_up_and_collect_in_memory(tmp_path: Path) -> None:
    before = set(Path("/dev/shm").glob("smelt-ranks-*"))
    for wrong, was_shared, is_over in on_two_ranks(tmp_path, meet):  # type: ignore[misc]
        assert wrong == []
        assert was_shared
        assert is_over
    assert set(Path("/dev/shm").glob("smelt-ranks-*")) == before


def test_a_rank_that_has_ended_is_missed(tmp_path: Path) -> None:
    heard, nothing = on_two_ranks(tmp_path, leave_early, "ends")
    assert nothing is None
    assert "another rank has ended or cannot be reached (rank 1 is gone)" in str(heard)


def test_a_rank_that_does_not_come_is_not_waited_for_for_ever(tmp_path: Path) -> None:
    heard, _ = on_two_ranks(tmp_path, leave_early, "sleeps")
    assert "rank 1 has not come for 1 s" in str(heard)


def test_where_memory_has_too_little_room_a_file_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_memory, "MEMORY_FOLDER", str(tmp_path / "absent"))
    monkeypatch.setattr(shared_memory.tempfile, "tempdir", str(tmp_path))
    path = create_memory(2)
    assert path.parent == tmp_path
    one = SharedMemory(0, 1, path, 1.0)
    one.sum_(total := torch.ones(3))
    assert total.tolist() == [1.0, 1.0, 1.0]
    one.close()


def test_memory_is_shared_by_ranks_of_one_machine_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_memory.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(shared_memory.platform, "system", lambda: "Linux")
    assert is_possible(2, 2)
    assert not is_possible(1, 1), "there is nobody to share with"
    assert not is_possible(4, 2), "two are elsewhere"
    monkeypatch.setattr(shared_memory.platform, "machine", lambda: "aarch64")
    assert not is_possible(2, 2), "stores may be seen in another order"
    monkeypatch.setattr(shared_memory.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(shared_memory.platform, "system", lambda: "Darwin")
    assert not is_possible(2, 2), "a file's room cannot be reserved there"
    with join(Ranks(), torch.device("cpu")):
        assert current() is None
