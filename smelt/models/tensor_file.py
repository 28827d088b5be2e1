"""A safetensors file written piece by piece; knows no model and no folder.

The library's own writer wants every tensor contiguous and writes them in one go. This one makes a piece of a tensor
contiguous as it comes to it, so that memory stays flat, and calls `pause` between pieces, so that a checkpoint can be
written beside training without getting in its way.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Pause = Callable[[], None]  # called after every piece of work

PIECE_BYTES = 1 << 20
NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
SAME_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # NumPy knows no bfloat16


def no_pause() -> None:
    """Go on at once."""


def write_tensors(tensors: Mapping[str, Tensor], path: Path, pause: Pause = no_pause) -> None:
    """Write one safetensors file and fsync it; tensors of one type give the very bytes that the library writes."""
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    with path.open("wb") as file:
        file.write(header_of(ordered))
        for _, tensor in ordered:
            for piece in pieces_of(tensor):
                file.write(piece.data)
                pause()
        file.flush()
        os.fsync(file.fileno())


def header_of(ordered: list[tuple[str, Tensor]]) -> bytes:
    """Length and JSON header; wide types come first, so that each tensor is aligned to its own element."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in ordered:
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def pieces_of(tensor: Tensor) -> Iterator[NDArray[Any]]:
    """A tensor's elements in row-major order, some rows at a time, on this thread alone.

    By NumPy, because torch would wake a second team of threads for the copies.
    """
    bits = np.atleast_1d(tensor.detach().cpu().view(SAME_BITS[tensor.dtype.itemsize]).numpy())
    row_bytes = bits[:1].nbytes
    num_rows = max(1, PIECE_BYTES // max(1, row_bytes))
    for first in range(0, len(bits), num_rows):
        yield np.ascontiguousarray(bits[first : first + num_rows])
