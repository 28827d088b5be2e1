"""Passes of kernels that are recorded and made again: the same bits, in memory that is used again."""

import pytest
import torch
from torch import Tensor

from kernels_built import built_kernels
from smelt.models import kernels
from smelt.models.linear import Int8Linear, Linear
from smelt.models.recording import Arena, Recording, current_recording, record
from smelt.models.rowwise import add

pytestmark = pytest.mark.usefixtures("compiled")


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels._BUILD, "built", built_kernels())


class Pass:
    """Products and sums, of which nothing but the last stays."""

    def __init__(self, dtype: torch.dtype, num_rows: int = 3) -> None:
        torch.manual_seed(0)
        self.x = torch.randn(num_rows, 64).to(dtype)
        self.layers = [Linear(64, 64).to(dtype), Int8Linear(torch.randn(64, 64)), Linear(64, 64, bias=False).to(dtype)]

    @torch.inference_mode()
    def __call__(self) -> Tensor:
        x = self.x
        for layer in self.layers:
            x = add(x, layer(x))
        return x

    @torch.inference_mode()
    def recorded(self, arena: Arena) -> Recording:
        return record(self, arena, built_kernels().replay)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_replay_computes_the_same_bits_from_what_lies_there_now(dtype: torch.dtype) -> None:
    run = Pass(dtype)
    recording = run.recorded(Arena())
    assert not recording.obstacles
    first = recording.outputs.clone()
    assert torch.equal(first, run())
    run.x.copy_(torch.randn(3, 64))
    assert torch.equal(recording.replay(), run())
    assert not torch.equal(recording.outputs, first)


def test_recordings_share_memory_but_not_their_outputs() -> None:
    arena, runs = Arena(), [Pass(torch.float32, num_rows) for num_rows in (3, 2)]
    recordings = [run.recorded(arena) for run in runs]
    expected = [run() for run in runs]
    for _ in range(2):
        for recording in recordings:
            recording.replay()
    assert all(torch.equal(recording.outputs, y) for recording, y in zip(recordings, expected, strict=True))
    held = arena.num_bytes
    del recordings
    runs[0].recorded(arena)
    assert arena.num_bytes == held


def test_what_torch_computes_itself_is_an_obstacle() -> None:
    x = torch.randn(2, 8)
    with torch.inference_mode():
        recording = record(lambda: (x.view(4, 4) * 2).sum(), Arena(), built_kernels().replay)
    assert recording.obstacles == {"aten.mul.Tensor", "aten.sum.default"}
    assert recording.outputs == pytest.approx(2 * float(x.sum()))


def test_a_pass_that_fails_ends_the_recording() -> None:
    def fail() -> None:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        record(fail, Arena(), built_kernels().replay)
    assert current_recording() is None
