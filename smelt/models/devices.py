"""Which device and number format to compute with, and how fast its matrix products are; knows no model."""

import platform
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

from smelt.errors import ConfigError
from smelt.models.host_memory import free_host_bytes

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def pick_device(name: str) -> torch.device:
    """The device of that name; `auto` takes CUDA, then Apple's MPS, then the CPU. ConfigError if it is absent."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device {name!r} is unknown; use auto, cpu, cuda, cuda:N or mps") from None
    if device.type == "cuda" and not (device.index or 0) < torch.cuda.device_count():
        raise ConfigError(f"device {name!r} is not here ({torch.cuda.device_count()} CUDA devices); use --device auto")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("device 'mps' is not here; use --device auto")
    return device


@contextmanager
def single_thread() -> Iterator[None]:
    """Torch computes with the calling thread alone."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def cpu_name() -> str:
    """The processor as the system calls it; Linux adds a model number, which tells apart those that share a name."""
    info = Path("/proc/cpuinfo")
    fields: dict[str, str] = {}
    for line in info.read_text(encoding="utf-8").splitlines() if info.is_file() else []:
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    if "model name" in fields:
        return f"{fields['model name']} (model {fields.get('model', '?')})"
    return platform.processor() or platform.machine()


def cpu_features() -> dict[str, bool]:
    """The instruction sets that decide how fast a CPU trains."""
    return {
        "avx2": torch.cpu._is_avx2_supported(),
        "avx512": torch.cpu._is_avx512_supported(),
        "avx512_bf16": torch.cpu._is_avx512_bf16_supported(),
        "avx512_vnni": torch.cpu._is_vnni_supported(),
        "amx": torch.cpu._is_amx_tile_supported(),
    }


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether bf16 matrix products are faster than fp32 there; CPUs without AMX or AVX512-bf16 emulate them."""
    if device.type == "cpu":
        features = cpu_features()
        return features["amx"] or features["avx512_bf16"]
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return False


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The format of that name; `auto` takes bf16 where it is fast, fp16 on older GPUs, else fp32."""
    if name != "auto":
        return DTYPES[name]
    if has_fast_bfloat16(device):
        return torch.bfloat16
    return torch.float16 if device.type == "cuda" else torch.float32


def has_compiler() -> bool:
    """Whether torch.compile can build CPU code here."""
    return any(shutil.which(compiler) for compiler in ("g++", "clang++", "c++"))


def seed_generator(device: torch.device, seed: int) -> None:
    """Seed what draws on a device. `torch.manual_seed` seeds all kinds there are, half a millisecond a time."""
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was asked to, so that a clock tells the truth."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


@cache
def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a large square matrix product: the best of some tries, in about 0.3 s on a CPU."""
    size = 1024 if device.type == "cpu" else 4096
    left = torch.randn(size, size, device=device).to(dtype)
    right = torch.randn(size, size, device=device).to(dtype)
    best = min(_seconds(lambda: torch.mm(left, right), device) for _ in range(12))
    return 2 * size**3 / best


def free_memory(device: torch.device) -> int:
    """Bytes that could be taken there now; on a CPU the less of what the system and a container's limit leave."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return free_host_bytes()
