"""Recording: notes the calls of kernels in one pass through a model, to make them again all at once; knows no model.

A pass of few tokens is hundreds of small calls, and a third of its time goes by between them. `record` runs a pass
and notes every kernel with its addresses; `Recording.replay` repeats that in one call, over the same memory. So
whoever records gives the pass inputs that stay where they are, writes the next ones there, and reads its outputs where
they were the first time.
"""

import struct
import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

ALIGNMENT = 64  # bytes, a cache line of the processor
MOST_ARGUMENTS = 17  # as in recording.h

T = TypeVar("T")
Replay = Callable[[int, int, int], None]  # (address of calls, how many, threads)


class Arena:
    """Memory for what lies between the kernels. What a pass has let go is used again, in every pass alike.

    Recordings may share one as long as they are replayed one after the other. `num_bytes` is what it has taken.
    """

    def __init__(self) -> None:
        self.num_bytes = 0
        self._free: dict[int, list[NDArray[np.uint8]]] = defaultdict(list)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor whose memory comes back when nothing looks at it any more."""
        num_bytes = int(np.prod(shape)) * dtype.itemsize
        size = 1 << max(num_bytes - 1, ALIGNMENT).bit_length()
        free = self._free[size]
        whole = free.pop() if free else self._more(size)
        start = -whole.ctypes.data % ALIGNMENT
        part = whole[start : start + num_bytes]
        # The tensor's storage holds the part, and so do all views of it.
        weakref.finalize(part, free.append, whole).atexit = False
        return torch.from_numpy(part).view(dtype).view(tuple(shape))

    def _more(self, size: int) -> NDArray[np.uint8]:
        self.num_bytes += size
        return np.empty(size + ALIGNMENT, dtype=np.uint8)


class Recording:
    """The calls of one pass. `outputs` are what it gave; `obstacles` name what cannot be called again.

    `kept`: what the calls read besides the inputs and weights, for whoever makes such to put there.
    """

    def __init__(self, arena: Arena, replay: Replay) -> None:
        self.arena = arena
        self.outputs: Any = None
        self.obstacles: set[str] = set()
        self.kept: list[object] = []
        self._replay = replay
        self._noted: list[list[int]] = []
        self._calls = np.zeros((0, MOST_ARGUMENTS + 1), dtype=np.int64)

    def note(self, address: int, arguments: Iterable[float | None]) -> None:
        """One call: of the function there, which takes its arguments as words of 8 bytes."""
        words = [address, *map(_word, arguments)]
        self._noted.append(words + [0] * (MOST_ARGUMENTS + 1 - len(words)))

    def seal(self, outputs: Any) -> None:
        """The pass is over."""
        self.outputs = outputs
        self._calls = np.array(self._noted, dtype=np.int64)
        self._noted.clear()

    def replay(self) -> Any:
        """Do it all again; the outputs, which the next replay overwrites."""
        assert not self.obstacles, "a recording with obstacles is a pass that has run once"
        self._replay(self._calls.ctypes.data, len(self._calls), torch.get_num_threads())
        return self.outputs


class _Here(threading.local):
    """What this thread is recording."""

    recording: Recording | None = None


_HERE = _Here()


def record(run: Callable[[], T], arena: Arena, replay: Replay) -> Recording:
    """Run a pass and note its calls. Its outputs are right in any case; replayed it can be without obstacles."""
    recording = Recording(arena, replay)
    _HERE.recording = recording
    try:
        with _Watch(recording):
            outputs = run()
    finally:
        _HERE.recording = None
    recording.seal(outputs)
    return recording


def current_recording() -> Recording | None:
    """Where this thread's calls are to be noted."""
    return _HERE.recording


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Memory for a kernel's output."""
    recording = _HERE.recording
    return torch.empty(shape, dtype=dtype) if recording is None else recording.arena.empty(shape, dtype)


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees all that torch computes itself: it would be missing from the replay. Other looks at memory are free."""

    def __init__(self, recording: Recording) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._recording = recording

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        outputs = func(*args, **(kwargs or {}))
        if not _is_view(args, outputs):
            self._recording.obstacles.add(str(func))
        return outputs


def _is_view(args: Sequence[Any], outputs: Any) -> bool:
    """Whether nothing was computed: what came out is the memory that went in."""
    tensors = outputs if isinstance(outputs, list | tuple) else [outputs]
    source = args[0] if args else None
    return isinstance(source, Tensor) and all(
        isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() == source.untyped_storage().data_ptr()
        for tensor in tensors
    )


def _word(value: float | None) -> int:
    if isinstance(value, float):
        return int.from_bytes(struct.pack("<f", value), "little")
    return value or 0
