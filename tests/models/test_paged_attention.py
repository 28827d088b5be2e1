"""Attention over blocks is dense attention of each row by itself, wherever its blocks lie."""

import pytest
import torch
from torch import Tensor

from kernels_built import built_kernels
from smelt.models.paged_attention import attend_gathered, suits_kernel

BLOCK_SIZE = 16
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def attend_compiled(*arguments):
    """As `attend_paged` where the kernels are there."""
    attend = built_kernels().attend if suits_kernel(*arguments[:-1]) else attend_gathered
    return attend(*arguments)


def dense(q_HD: Tensor, k_LGD: Tensor, v_LGD: Tensor, window: int | None) -> Tensor:
    """softmax(q k / sqrt(D)) v of one query at the last position, head by head in fp64."""
    num_heads, width = q_HD.shape
    group = num_heads // k_LGD.shape[1]
    seen = k_LGD.shape[0] if window is None else min(window, k_LGD.shape[0])
    mixed = []
    for head in range(num_heads):
        k_LD, v_LD = (x[-seen:, head // group].double() for x in (k_LGD, v_LGD))
        weights = torch.softmax(k_LD @ q_HD[head].double() / width**0.5, dim=0)
        mixed.append(weights @ v_LD)
    return torch.stack(mixed)


def blocks_of(rows: list[tuple[Tensor, Tensor]], shape: tuple[int, int, int, int], dtype: torch.dtype):
    """Caches full of noise in which the rows' keys and values lie in blocks out of order; and the tables."""
    keys, values = (torch.randn(shape).to(dtype) for _ in range(2))
    free = torch.randperm(shape[0]).tolist()
    num_blocks = max(-(-len(k) // BLOCK_SIZE) for k, _ in rows)
    tables = torch.zeros(len(rows), num_blocks, dtype=torch.int32)
    for row, (k_LGD, v_LGD) in enumerate(rows):
        for number, start in enumerate(range(0, len(k_LGD), BLOCK_SIZE)):
            block = free.pop()
            tables[row, number] = block
            for cache, content in ((keys, k_LGD), (values, v_LGD)):
                piece = content[start : start + BLOCK_SIZE].transpose(0, 1)
                cache[block, :, : piece.shape[1]] = piece
    return keys, values, tables


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("window", [None, 1, 5, 40])
@pytest.mark.parametrize(
    ("lengths", "heads", "width"),
    [
        ([1], (4, 4), 16),
        ([16, 17, 1, 40], (6, 2), 64),
        ([33, 129], (9, 3), 64),
        ([200], (8, 1), 128),
        ([7, 70], (2, 2), 12),
        ([50, 3], (20, 1), 80),
    ],
)
@pytest.mark.parametrize("attend", [attend_compiled, attend_gathered])
def test_each_row_attends_to_its_own_blocks(attend, lengths, heads, width, window, dtype) -> None:
    torch.manual_seed(1)
    num_heads, num_kv_heads = heads
    rows = [tuple(torch.randn(length, num_kv_heads, width).to(dtype) for _ in range(2)) for length in lengths]
    keys, values, tables = blocks_of(rows, (40, num_kv_heads, BLOCK_SIZE, width), dtype)
    q_BHD = torch.randn(len(lengths), num_heads, width).to(dtype)

    mixed = attend(q_BHD, keys, values, tables, torch.tensor(lengths, dtype=torch.int32), window)

    expected = torch.stack([dense(q, k, v, window) for q, (k, v) in zip(q_BHD, rows, strict=True)])
    assert mixed.dtype == dtype
    assert mixed.shape == q_BHD.shape
    torch.testing.assert_close(mixed.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_queries_may_lie_within_a_packed_projection() -> None:
    torch.manual_seed(3)
    keys, values, tables = blocks_of(
        [(torch.randn(30, 2, 16), torch.randn(30, 2, 16))] * 2, (8, 2, 16, 16), torch.float32
    )
    packed, lengths_B = torch.randn(2, 10, 16), torch.tensor([30, 30], dtype=torch.int32)
    q_BHD = packed[:, :6]

    mixed = attend_compiled(q_BHD, keys, values, tables, lengths_B, None)

    torch.testing.assert_close(mixed, attend_gathered(q_BHD, keys, values, tables, lengths_B, None))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_row_does_not_depend_on_its_company(dtype) -> None:
    torch.manual_seed(2)
    lengths = [190, 3, 41]
    rows = [tuple(torch.randn(length, 3, 64).to(dtype) for _ in range(2)) for length in lengths]
    keys, values, tables = blocks_of(rows, (30, 3, BLOCK_SIZE, 64), dtype)
    q_BHD, lengths_B = torch.randn(3, 9, 64).to(dtype), torch.tensor(lengths, dtype=torch.int32)

    together = attend_compiled(q_BHD, keys, values, tables, lengths_B, None)

    for row, length in enumerate(lengths):
        one = slice(row, row + 1)
        num_blocks = -(-length // BLOCK_SIZE)
        alone = attend_compiled(q_BHD[one], keys, values, tables[one, :num_blocks].contiguous(), lengths_B[one], None)
        assert torch.equal(alone, together[one])
