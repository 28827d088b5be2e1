"""Whether a run fits into the memory of this machine, before it starts; knows no ledger, no HTTP and no torch.

What only its data could tell (a classifier's shape) and what lies on a GPU is not judged here.
"""

from pathlib import Path

from smelt.control.datasets import open_for
from smelt.errors import InvalidInput
from smelt.models.folders import read_config
from smelt.models.footprint import adapter_values
from smelt.models.host_memory import host_bytes
from smelt.models.training_footprint import GIB, Workload, fitting, training_footprint
from smelt.run_configs import FineTuneConfig, RunConfig, TrainConfig
from smelt.settings import Settings

MARGIN = 0.1  # of the memory, for whatever else the machine does
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


def remedy(work: Workload, smaller: Workload) -> str:
    """The settings that differ, as one would give them."""
    names = ("batch_size", "gradient_accumulation_steps", "gradient_checkpointing")
    changed = [
        f"{name}={getattr(smaller, name)}".lower() for name in names if getattr(smaller, name) != getattr(work, name)
    ]
    total = training_footprint(smaller).total / GIB
    return f"it fits, in {total:.1f} GiB and with the same steps, with {', '.join(changed)}"


def workload(config: RunConfig, settings: Settings) -> Workload | None:
    """What a config has trained on a CPU; None where its shape is not known yet."""
    if isinstance(config, TrainConfig):
        if config.init_from == "scratch":
            shape = config.decoder_config(_vocab_size(config, settings))
        else:
            shape = read_config(settings.models / config.init_from)
        block_size, num_trained = config.block_size or shape.block_size, None
    elif isinstance(config, FineTuneConfig):
        shape = read_config(settings.models / config.model)
        block_size = min(config.max_length or shape.block_size, USUAL_EXAMPLE)
        num_trained = adapter_values(shape, config.lora_rank) if config.lora else None
    else:
        return None
    return Workload(
        shape=shape,
        dtype=config.dtype if config.dtype != "auto" else _fastest_dtype(),
        batch_size=config.batch_size,
        block_size=block_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        gradient_checkpointing=config.gradient_checkpointing,
        num_trained=num_trained,
    )


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
