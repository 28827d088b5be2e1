"""Kernels: compiles `kernels.cpp` where there is a compiler, once per machine, and calls it; knows no model.

Torch is used instead until `start_build` was called, and for good where there is no compiler. The kernels share the
OpenMP library that torch has loaded, so that there is one pool of threads.
"""

import ctypes
import fcntl
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from threading import Lock, Thread
from typing import Any

import torch
from torch import Tensor

from smelt.models.devices import cpu_features
from smelt.models.recording import current_recording, empty
from smelt.models.training_kernels import SUFFIXES, WHOLE_ROW, Address, Count, Threads, TrainingKernels, by_dtype

_FILES = (
    *("kernels.cpp", "team.h", "lora.h", "rowwise.h", "recording.h", "products.h", "matmul.h"),
    *("attention.h", "lora_pass.h", "rowwise_back.h", "targets.h", "table_rows.h"),  # of what is trained
)
SOURCE, *INCLUDED = (Path(__file__).with_name(name) for name in _FILES)
FLAGS = ("-O3", "-march=native", "-std=c++20", "-fopenmp", "-fPIC", "-fno-math-errno")  # whose numbers nobody asks for
BUILD_SECONDS = 120.0

log = logging.getLogger(__name__)

_LINEAR = [Address] * 4 + [Count] * 3 + [Threads]
_MATMUL = [Address, Address, ctypes.c_int, Address, Address, *[Count] * 3, Threads]
_LINEAR_INT8 = [Address] * 5 + [Count] * 3 + [Threads]
_ATTEND = [Address, Count, Address, Address, Count, Address, Count, Address, Count, Address] + [Count] * 5 + [Threads]
_LORA = [Address] * 8 + [Count, Address] + [Count] * 4 + [Threads]
_RMS_NORM = [Address] * 3 + [Count] * 2 + [ctypes.c_float, Threads]
_LAYER_NORM = [Address] * 4 + [Count] * 2 + [ctypes.c_float]
_NORM_HEADS = [Address, Count] + [Address] * 3 + [Count] * 4 + [ctypes.c_float]
_GELU = [Address] * 2 + [Count]
_ADD = [Address] * 3 + [Count]
_LOOK_UP = [Address] * 3 + [Count] * 2
_ROTARY_TABLES = [Address] * 4 + [Count] * 2
_SWIGLU = [Address] * 2 + [Count] * 2 + [Threads]
_ROTATE = [Address, Count, Address, Address, Address, Count, Count, Count, Threads]
_WRITE_CACHE: list[Any] = [Address, Count] * 2 + [Address] * 3 + [Count] * 3


class Function:
    """One function of the library; its calls are noted where a pass is being recorded."""

    def __init__(self, functions: ctypes.CDLL, name: str, types: Sequence[Any]) -> None:
        self._call = functions[name]
        self._call.argtypes, self._call.restype = types, None
        self._of_words = ctypes.cast(functions[f"{name}_of_words"], Address).value or 0

    def __call__(self, *arguments: float | None) -> None:
        """Pointers are numbers here, and None is one to nothing."""
        self._call(*arguments)
        if (recording := current_recording()) is not None:
            recording.note(self._of_words, arguments)


def _by_dtype(functions: ctypes.CDLL, name: str, types: Sequence[Any]) -> dict[torch.dtype, Function]:
    return {dtype: Function(functions, f"{name}_{suffix}", types) for dtype, suffix in SUFFIXES.items()}


class Kernels:
    """The compiled functions. They take contiguous CPU tensors in fp32 or bf16, and trust their shapes."""

    def __init__(self, library: Path) -> None:
        functions = ctypes.CDLL(str(library))
        self._linear = _by_dtype(functions, "linear", _LINEAR)
        self._matmul = by_dtype(functions, "matmul", _MATMUL)
        self._linear_int8 = _by_dtype(functions, "linear_int8", _LINEAR_INT8)
        self._attend = _by_dtype(functions, "attend", _ATTEND)
        self._lora = _by_dtype(functions, "lora", _LORA)
        self._rms_norm = _by_dtype(functions, "rms_norm", _RMS_NORM)
        self._layer_norm = _by_dtype(functions, "layer_norm", _LAYER_NORM)
        self._norm_heads = _by_dtype(functions, "norm_heads", _NORM_HEADS)
        self._gelu_tanh = _by_dtype(functions, "gelu_tanh", _GELU)
        self._swiglu = _by_dtype(functions, "swiglu", _SWIGLU)
        self._rotate = _by_dtype(functions, "rotate", _ROTATE)
        self._rotary_tables = _by_dtype(functions, "rotary_tables", _ROTARY_TABLES)
        self._look_up = Function(functions, "look_up", _LOOK_UP)
        self._add = _by_dtype(functions, "add", _ADD)
        self._write_cache = Function(functions, "write_cache", _WRITE_CACHE)
        self.training = TrainingKernels(functions)
        self.replay = functions.replay  # what a `Recording` wants
        self.replay.argtypes, self.replay.restype = [Address, Count, Threads], None

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """(..., in) -> (..., out): x W^T + b, all of one dtype, summed in fp32."""
        return _product(self._linear[x.dtype], x, weight, (weight.data_ptr(),), bias)

    def matmul(self, x_NC: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
        """out (N, O) = x W + b for W (C, O), which lies by its rows or its columns; a row's bits are its own."""
        lies_by_rows = weight.is_contiguous()
        addresses = None if bias is None else bias.data_ptr(), out.data_ptr()
        self._matmul[x_NC.dtype](
            x_NC.data_ptr(),
            weight.data_ptr(),
            lies_by_rows,
            *addresses,
            len(x_NC),
            weight.shape[1],
            weight.shape[0],
            torch.get_num_threads(),
        )

    def linear_int8(self, x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
        """The same with int8 weights and an fp32 scale for each output. x may be rounded to int8 too."""
        return _product(self._linear_int8[x.dtype], x, weight, (weight.data_ptr(), scales.data_ptr()), bias)

    def attend(
        self, q_BHD: Tensor, keys: Tensor, values: Tensor, tables_BN: Tensor, lengths_B: Tensor, window: int | None
    ) -> Tensor:
        """As `paged_attention.attend_paged`, whose `suits_kernel` says what it takes."""
        num_rows, num_heads, width = q_BHD.shape
        out_BHD = empty(q_BHD.shape, q_BHD.dtype)
        self._attend[q_BHD.dtype](
            q_BHD.data_ptr(),
            q_BHD.stride(0),
            keys.data_ptr(),
            values.data_ptr(),
            keys.stride(0),
            tables_BN.data_ptr(),
            tables_BN.shape[1],
            lengths_B.data_ptr(),
            WHOLE_ROW if window is None else window,
            out_BHD.data_ptr(),
            num_rows,
            num_heads,
            keys.shape[1],
            keys.shape[2],
            width,
            torch.get_num_threads(),
        )
        return out_BHD

    def add_lora(
        self,
        y_NO: Tensor,
        x_NC: Tensor,
        factors: tuple[Tensor, Tensor, Tensor],
        groups: tuple[Tensor, Tensor, Tensor],
        part_rows: Tensor,
    ) -> None:
        """What `lora.LoraMatrix` adds to y: `factors` are its a, b and scales (fp32), `groups` a `lora.Groups`."""
        a, b, scales = factors
        order, starts, slots = groups
        self._lora[x_NC.dtype](
            x_NC.data_ptr(),
            a.data_ptr(),
            b.data_ptr(),
            scales.data_ptr(),
            y_NO.data_ptr(),
            order.data_ptr(),
            starts.data_ptr(),
            slots.data_ptr(),
            len(slots),
            part_rows.data_ptr(),
            len(part_rows),
            b.shape[1],
            x_NC.shape[1],
            y_NO.shape[1],
            torch.get_num_threads(),
        )

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """(..., C): `torch.nn.functional.rms_norm` over the last dimension."""
        y = empty(x.shape, x.dtype)
        width = x.shape[-1]
        self._rms_norm[x.dtype](
            x.data_ptr(), weight.data_ptr(), y.data_ptr(), x.numel() // width, width, eps, torch.get_num_threads()
        )
        return y

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        """(..., C): `torch.nn.functional.layer_norm` over the last dimension."""
        y = empty(x.shape, x.dtype)
        width = x.shape[-1]
        bias_at = None if bias is None else bias.data_ptr()
        addresses = x.data_ptr(), weight.data_ptr(), bias_at, y.data_ptr()
        self._layer_norm[x.dtype](*addresses, x.numel() // width, width, eps)
        return y

    def norm_heads(self, x_NHD: Tensor, of_queries: Tensor, of_keys: Tensor, num_queries: int, eps: float) -> Tensor:
        """(N, H, D): RMSNorm of each head, the first ones by the queries' weight; a token's heads in one piece."""
        y_NHD = empty(x_NHD.shape, x_NHD.dtype)
        num_tokens, num_heads, width = x_NHD.shape
        addresses = of_queries.data_ptr(), of_keys.data_ptr(), y_NHD.data_ptr()
        sizes = num_tokens, num_queries, num_heads, width
        self._norm_heads[x_NHD.dtype](x_NHD.data_ptr(), x_NHD.stride(0), *addresses, *sizes, eps)
        return y_NHD

    def gelu_tanh(self, x: Tensor) -> Tensor:
        """GELU in its tanh form."""
        y = empty(x.shape, x.dtype)
        self._gelu_tanh[x.dtype](x.data_ptr(), y.data_ptr(), x.numel())
        return y

    def look_up(self, table: Tensor, ids: Tensor) -> Tensor:
        """(V, C), int64 (...) below V -> (..., C): the rows of these numbers."""
        rows = empty((*ids.shape, table.shape[1]), table.dtype)
        width = table.shape[1] * table.element_size()
        self._look_up(table.data_ptr(), ids.data_ptr(), rows.data_ptr(), ids.numel(), width)
        return rows

    def rotary_tables(self, positions_N: Tensor, frequencies: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(N, D) each, as `layers.rotary_tables`, for int64 positions and fp32 frequencies (D/2,)."""
        shape = (len(positions_N), 2 * len(frequencies))
        cos, sin = empty(shape, dtype), empty(shape, dtype)
        self._rotary_tables[dtype](
            positions_N.data_ptr(),
            frequencies.data_ptr(),
            cos.data_ptr(),
            sin.data_ptr(),
            len(positions_N),
            len(frequencies),
        )
        return cos, sin

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """x + y, of one shape."""
        total = empty(x.shape, x.dtype)
        self._add[x.dtype](x.data_ptr(), y.data_ptr(), total.data_ptr(), x.numel())
        return total

    def swiglu(self, x: Tensor) -> Tensor:
        """(..., 2F) -> (..., F): silu(first half) * second half."""
        width = x.shape[-1] // 2
        y = empty((*x.shape[:-1], width), x.dtype)
        self._swiglu[x.dtype](x.data_ptr(), y.data_ptr(), y.numel() // width, width, torch.get_num_threads())
        return y

    def rotate(self, x_NHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(N, H, D): as `layers.rotate`; each token's heads in one piece, `cos` and `sin` (N, D) in all."""
        y_NHD = empty(x_NHD.shape, x_NHD.dtype)
        self._rotate[x_NHD.dtype](
            x_NHD.data_ptr(),
            x_NHD.stride(0),
            cos.data_ptr(),
            sin.data_ptr(),
            y_NHD.data_ptr(),
            *x_NHD.shape,
            torch.get_num_threads(),
        )
        return y_NHD

    def write_cache(self, k_NGD: Tensor, v_NGD: Tensor, places_NG: Tensor, keys: Tensor, values: Tensor) -> None:
        """As `rowwise.write_cache`; each token's vectors in one piece, the caches contiguous and of the same dtype."""
        num_tokens, num_heads, width = k_NGD.shape
        size = k_NGD.element_size()
        self._write_cache(
            k_NGD.data_ptr(),
            k_NGD.stride(0) * size,
            v_NGD.data_ptr(),
            v_NGD.stride(0) * size,
            places_NG.data_ptr(),
            keys.data_ptr(),
            values.data_ptr(),
            num_tokens,
            num_heads,
            width * size,
        )


def _product(
    function: Function, x: Tensor, weight: Tensor, weight_addresses: tuple[int, ...], bias: Tensor | None
) -> Tensor:
    num_out, width = weight.shape
    y = empty((*x.shape[:-1], num_out), x.dtype)
    function(
        x.data_ptr(),
        *weight_addresses,
        None if bias is None else bias.data_ptr(),
        y.data_ptr(),
        x.numel() // width,
        num_out,
        width,
        torch.get_num_threads(),
    )
    return y


class _Build:
    """The one build of this process, and what came of it."""

    def __init__(self) -> None:
        self.lock = Lock()
        self.future: Future[Kernels | None] | None = None
        self.built: Kernels | None = None


_BUILD = _Build()


def start_build(folder: Path) -> None:
    """Have the kernels ready soon, compiled into this folder unless they lie there. Later calls do nothing."""
    with _BUILD.lock:
        if _BUILD.future is not None:
            return
        _BUILD.future = Future()
    Thread(target=_build_into, args=(folder, _BUILD.future), name="smelt-kernels", daemon=True).start()


def kernels() -> Kernels | None:
    """The kernels, after waiting for their build; None where none was started or they cannot be had."""
    if _BUILD.built is not None:  # hundreds of times in a step of few tokens, so without the future's lock
        return _BUILD.built
    return None if _BUILD.future is None else _BUILD.future.result()


def product_kernels(x: Tensor) -> Kernels | None:
    """Those whose products of many rows are no slower than torch's: not where the processor multiplies tiles."""
    is_fast = _multiplies_fast(x.dtype) if x.dtype in SUFFIXES else False
    return kernels_for_dtype(x, x.dtype) if is_fast else None


@cache
def _multiplies_fast(dtype: torch.dtype) -> bool:
    features = cpu_features()
    if dtype == torch.bfloat16:
        return features["avx512_bf16"] and not features["amx"]
    return features["avx512"]


def training_kernels(x: Tensor) -> TrainingKernels | None:
    """Those that have gradients, where they can compute with x."""
    found = kernels_for_dtype(x, x.dtype)
    return None if found is None else found.training


def kernels_for_dtype(x: Tensor, dtype: torch.dtype) -> Kernels | None:
    """The kernels, where they can compute with numbers of that kind beside x."""
    is_known = x.device.type == "cpu" and dtype in SUFFIXES
    return kernels() if is_known and not torch.compiler.is_compiling() else None


def _build_into(folder: Path, future: "Future[Kernels | None]") -> None:
    try:
        _BUILD.built = _built(folder)
        future.set_result(_BUILD.built)
    except BaseException as error:  # noqa: BLE001  (whoever waits gets it)
        future.set_exception(error)


def _built(folder: Path) -> Kernels | None:
    compiler, openmp = shutil.which("g++"), loaded_openmp()
    if compiler is None or openmp is None:
        log.info("no g++ or no OpenMP of torch's here: products of few rows are left to torch")
        return None
    try:
        return Kernels(compiled(folder, compiler, openmp))
    except (OSError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or str(error)
        log.warning("the CPU kernels could not be built, torch computes in their place: %s", reason)
        return None


def compiled(folder: Path, compiler: str, openmp: Path) -> Path:
    """The library of this source, compiler and processor. OSError, or SubprocessError where the compiler fails."""
    version = _output([compiler, "--version"])
    sources = [path.read_text() for path in (SOURCE, *INCLUDED)]
    key = hashlib.sha256("\n".join([*sources, version, _instructions(), str(openmp), *FLAGS]).encode())
    library = folder / f"kernels-{key.hexdigest()[:16]}.so"
    folder.mkdir(parents=True, exist_ok=True)
    with _one_at_a_time(folder):
        if not library.is_file():
            _compile(compiler, openmp, library)
    return library


def _compile(compiler: str, openmp: Path, library: Path) -> None:
    unlinked, unnamed = (library.with_suffix(f".{os.getpid()}.{suffix}") for suffix in ("o", "so"))
    compiling = [compiler, *FLAGS, "-c", str(SOURCE), "-o", str(unlinked)]
    # Linked without -fopenmp, which would bring the compiler's own library beside torch's.
    linking = [compiler, "-shared", str(unlinked), str(openmp), "-o", str(unnamed)]
    try:
        for command in (compiling, linking):
            _output(command)
        unnamed.replace(library)
    finally:
        for path in (unlinked, unnamed):
            path.unlink(missing_ok=True)


def _output(command: list[str]) -> str:
    # In a group of its own: a Ctrl-C in the terminal is for what waits for the kernels, not for the compiler.
    return subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=BUILD_SECONDS, process_group=0
    ).stdout


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def loaded_openmp() -> Path | None:
    """The GNU OpenMP library that torch brought into this process; None elsewhere than on Linux."""
    maps = Path("/proc/self/maps")
    if sys.platform != "linux" or not maps.is_file():
        return None
    files = (line.split(maxsplit=5)[-1] for line in maps.read_text().splitlines())
    return next((Path(file) for file in files if "libgomp" in Path(file).name), None)


def _instructions() -> str:
    """What `-march=native` depends on: a home folder may be shared by machines."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = ("model name", "flags", "Features", "CPU implementer", "CPU part")
    return platform.machine() + "".join(sorted({line for line in lines if line.startswith(names)}))
