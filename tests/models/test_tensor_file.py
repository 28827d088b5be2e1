"""Our writer of safetensors against the library's: the same bytes, whatever the tensors are like."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from smelt.models import tensor_file
from smelt.models.tensor_file import NAMES, write_tensors


def some(dtype: torch.dtype, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(len(shape))
    return torch.randint(0, 2 if dtype == torch.bool else 100, shape, generator=generator).to(dtype)


@pytest.mark.parametrize("piece_bytes", [1, 100, 1 << 20])
@pytest.mark.parametrize("dtype", NAMES, ids=str)
def test_the_bytes_are_the_librarys(
    dtype: torch.dtype, piece_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensor_file, "PIECE_BYTES", piece_bytes)
    shapes = {"scalar": (), "grüße": (7, 5), "empty": (0, 3), "cube": (2, 3, 4)}
    tensors = {name: some(dtype, *shape) for name, shape in shapes.items()}
    write_tensors(tensors, tmp_path / "ours")
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_types_may_be_mixed(tmp_path: Path) -> None:
    tensors = {str(dtype): some(dtype, 3) for dtype in NAMES}
    write_tensors(tensors, tmp_path / "file")
    again = load_file(tmp_path / "file")
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())
    assert all(again[name].dtype == tensor.dtype for name, tensor in tensors.items())


def test_views_are_written_as_what_they_show(tmp_path: Path) -> None:
    table = torch.nn.Parameter(torch.arange(600_000, dtype=torch.float32).view(600, 1000))
    views = {
        "transposed": table.t(),
        "rows": table[3:9],
        "every other": table[::2, ::3],
        "rounded": table.bfloat16().t(),
    }
    num_pieces = 0

    def count() -> None:
        nonlocal num_pieces
        num_pieces += 1

    write_tensors(views, tmp_path / "file", count)
    again = load_file(tmp_path / "file")
    assert all(torch.equal(again[name], view) for name, view in views.items())
    assert num_pieces == 3 + 1 + 1 + 2, "a large tensor is written some rows at a time"
