"""Whether a run fits into this machine's memory, and waiting until it does; knows no ledger, no HTTP and no torch.

What only its data could tell (a classifier's shape) and what lies on a GPU is not judged here.
"""

import time
from collections.abc import Callable
from pathlib import Path

from smelt.configs import DecoderConfig
from smelt.control.datasets import open_for
from smelt.errors import InvalidInput, Unavailable
from smelt.models.architectures import CONFIG_FILE
from smelt.models.folders import adapter_rank, base_of, read_config
from smelt.models.footprint import adapter_values
from smelt.models.host_memory import free_host_bytes, host_bytes
from smelt.models.training_footprint import GIB, Workload, fitting, training_footprint
from smelt.run_configs import NEW_RANK, FineTuneConfig, RunConfig, TrainConfig, out_dir_of
from smelt.settings import Settings

MARGIN = 0.1  # of the memory, for whatever else the machine does
PATIENCE_S = 1800.0  # that a run waits for memory which others hold: idle models are unloaded sooner
LOOK_SECONDS = 0.5
USUAL_VOCABULARIES = {"bytes": 257, "char": 256, None: 4096}
GPT2_VOCABULARY = 50257
USUAL_EXAMPLE = 256  # tokens: few are as long as they may be
CPUINFO = Path("/proc/cpuinfo")
FAST_BFLOAT16 = {"avx512_bf16", "amx_tile"}


def check_memory(config: RunConfig, settings: Settings, device: str) -> None:
    """InvalidInput, with the figures and the nearest settings that fit, for a run that cannot fit on that device."""
    if not device.startswith("cpu"):
        return
    work = workload(config, settings)
    if work is None:
        return
    available = int(host_bytes() * (1 - MARGIN)) // config.ranks
    needed = training_footprint(work)
    if needed.total <= available:
        return
    smaller = fitting(work, available)
    each = f" for each of {config.ranks} ranks" if config.ranks > 1 else ""
    raise InvalidInput(
        f"this run does not fit: it needs about {needed}, and there are {available / GIB:.1f} GiB{each}; "
        + (
            remedy(work, smaller)
            if smaller
            else "not even one row at a time fits: choose a smaller model or block_size"
        ),
        param="batch_size",
    )


def needed_bytes(config: RunConfig, settings: Settings) -> int:
    """Memory that all ranks of a run take together; 0 where nobody can tell."""
    work = workload(config, settings)
    return 0 if work is None else training_footprint(work).total * config.ranks


def shortage(config: RunConfig, settings: Settings, device: str) -> str | None:
    """What a run lacks now on that device, in words; None where it may begin, or nobody can tell."""
    if not device.startswith("cpu"):
        return None
    needed, free = needed_bytes(config, settings), free_host_bytes()
    if needed <= free:
        return None
    return f"it waits for memory: it needs about {needed / GIB:.1f} GiB, and {free / GIB:.1f} GiB are free"


def wait_for_memory(
    config: RunConfig, settings: Settings, device: str, tell: Callable[[str], object], patience_s: float = PATIENCE_S
) -> None:
    """Return when a run has the memory that it needs; `tell` hears once what it waits for. Unavailable after long."""
    end, has_told = time.monotonic() + patience_s, False
    while (lack := shortage(config, settings, device)) is not None:
        if time.monotonic() > end:
            raise Unavailable(f"{lack}; unload models or end other programs, then resume the run")
        if not has_told:
            tell(lack)
            has_told = True
        time.sleep(LOOK_SECONDS)


def remedy(work: Workload, smaller: Workload) -> str:
    """The settings that differ, as one would give them."""
    names = ("batch_size", "gradient_accumulation_steps", "gradient_checkpointing", "sharding")
    changed = [
        f"{name}={getattr(smaller, name)}".lower() for name in names if getattr(smaller, name) != getattr(work, name)
    ]
    total = training_footprint(smaller).total / GIB
    return f"it fits, in {total:.1f} GiB and with the same steps, with {', '.join(changed)}"


def workload(config: RunConfig, settings: Settings) -> Workload | None:
    """What a config has trained on a CPU; None where its shape is not known yet."""
    shape: DecoderConfig | None
    if isinstance(config, TrainConfig):
        if config.init_from == "scratch":
            shape = config.decoder_config(_vocab_size(config, settings))
        elif config.init_from == "resume":
            shape = _shape_in(out_dir_of(config) / "last")
        else:
            shape = _shape_in(settings.models / config.init_from)
        num_trained = None
    elif isinstance(config, FineTuneConfig):
        folder = settings.models / config.model
        shape = _shape_in(base_of(folder))
        rank = adapter_rank(folder) or config.lora_rank or NEW_RANK
        num_trained = adapter_values(shape, rank) if shape and config.lora else None
    else:
        return None
    if shape is None:
        return None
    return Workload(
        shape=shape,
        dtype=config.dtype if config.dtype != "auto" else _fastest_dtype(),
        batch_size=config.batch_size,
        block_size=_block_size(config, shape),
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        gradient_checkpointing=config.gradient_checkpointing,
        num_trained=num_trained,
        num_ranks=config.ranks,
        sharding=config.sharding,
    )


def _shape_in(folder: Path) -> DecoderConfig | None:
    return read_config(folder) if (folder / CONFIG_FILE).is_file() else None


def _block_size(config: TrainConfig | FineTuneConfig, shape: DecoderConfig) -> int:
    if isinstance(config, TrainConfig):
        return config.block_size or shape.block_size
    return min(config.max_length or shape.block_size, USUAL_EXAMPLE)


def _vocab_size(config: TrainConfig, settings: Settings) -> int:
    name = config.tokenizer
    if name is None and config.dataset is not None:
        return open_for(settings.datasets, config.dataset, owner=None).manifest.vocab_size
    if name is not None and name.startswith("bpe:") and name[4:].isdigit():
        return int(name[4:])
    return USUAL_VOCABULARIES.get(name, GPT2_VOCABULARY)


def _fastest_dtype() -> str:
    """As `models.devices` picks it, without torch."""
    if not CPUINFO.is_file():
        return "float32"
    flags = next((line for line in CPUINFO.read_text(encoding="utf-8").splitlines() if line.startswith("flags")), "")
    return "bfloat16" if FAST_BFLOAT16 & set(flags.split()) else "float32"
