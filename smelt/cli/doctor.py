"""`smelt doctor`: what this machine has for training and serving, and what is wrong with it; changes nothing."""

import os
import platform
import shutil
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import click
from rich.console import Console

from smelt import __version__
from smelt.errors import ConfigError
from smelt.settings import Settings, load_settings, setting_sources, tiktoken_cache

EXAMPLES = """\b
Examples:
  smelt doctor
  SMELT_HOME=/data/smelt smelt doctor"""

GIB = 2**30
LOW_DISK_GIB = 2
EXTRAS = {"hub": "datasets", "wandb": "wandb", "tensorboard": "tensorboard"}  # extra -> module that it brings


@dataclass(frozen=True, slots=True)
class Fact:
    """A line of the report."""

    topic: str
    text: str


@dataclass(frozen=True, slots=True)
class Problem:
    """Something wrong, and what to do about it."""

    what: str
    remedy: str


Finding = Fact | Problem


@click.command(epilog=EXAMPLES, short_help="Say what this machine has, and what is wrong with it.")
def command() -> None:
    """Print Python, torch, devices, disk and settings, then what is wrong and how to mend it.

    Ends with exit code 1 if something is wrong, 0 if nothing is.
    """
    settings, findings = read_settings()
    findings += [*program(), *processor(settings), *accelerators(settings), *storage(settings), *options()]
    problems = [finding for finding in findings if isinstance(finding, Problem)]
    show([finding for finding in findings if isinstance(finding, Fact)], problems)
    if problems:
        raise click.exceptions.Exit(1)


def show(facts: list[Fact], problems: list[Problem]) -> None:
    """Print the report; one line each, also through a pipe."""
    console = Console(highlight=False, soft_wrap=True)
    for fact in facts:
        console.print(f"[bold]{fact.topic:<12}[/bold]", end=" ")
        console.print(fact.text, markup=False)
    console.print()
    for problem in problems:
        console.print("[red]wrong:[/red]", end=" ")
        console.print(f"{problem.what}\n       {problem.remedy}", markup=False)
    if not problems:
        console.print("[green]nothing is wrong[/green]")


def read_settings() -> tuple[Settings, list[Finding]]:
    """The settings in force, one line each; the defaults where they cannot be read."""
    try:
        settings, sources = load_settings(), setting_sources()
    except ConfigError as error:
        return Settings.model_construct(), [Problem(str(error), "correct it; the rest of this report uses defaults")]
    return settings, [
        Fact("setting", f"{name} = {getattr(settings, name)} ({sources[name]})") for name in Settings.model_fields
    ]


def program() -> list[Finding]:
    """Who runs: smelt, Python, the system."""
    return [
        Fact("smelt", f"{__version__} in {Path(__file__).parents[1]}"),
        Fact("python", f"{platform.python_version()} at {sys.executable}"),
        Fact("system", f"{platform.platform()}, {memory_gib():.0f} GiB memory"),
    ]


def memory_gib() -> float:
    """Physical memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB


def processor(settings: Settings) -> list[Finding]:
    """The CPU, what it computes fast, and how many threads work on it."""
    import torch

    from smelt.models.devices import cpu_features, cpu_name, has_compiler
    from smelt.training.parallel import num_cores

    cores = usable_cores()
    threads = settings.threads or num_cores()
    findings: list[Finding] = [
        Fact("torch", f"{torch.__version__} ({build()})"),
        Fact("cpu", f"{cpu_name()}, {cores:g} usable cores"),
        Fact("cpu has", ", ".join(f"{name} {'yes' if has else 'no'}" for name, has in cpu_features().items())),
        Fact("threads", f"{threads}"),
        Fact(
            "compiler", "found: torch.compile works" if has_compiler() else "none: training runs without torch.compile"
        ),
    ]
    if threads > max(1, cores):
        findings.append(
            Problem(
                f"{threads} threads share {cores:g} cores, which is slow", f"set SMELT_THREADS={max(1, int(cores))}"
            )
        )
    return findings


def build() -> str:
    """What torch was built for."""
    import torch

    if torch.version.cuda:
        return f"CUDA {torch.version.cuda}"
    return f"ROCm {torch.version.hip}" if torch.version.hip else "CPU build"


def usable_cores(quota_file: Path = Path("/sys/fs/cgroup/cpu.max")) -> float:
    """Cores that this process may use: those it sees, or fewer where a container has a quota."""
    from smelt.training.parallel import num_cores

    quota, period = quota_file.read_text().split() if quota_file.is_file() else ("max", "1")
    return num_cores() if quota == "max" else min(num_cores(), int(quota) / int(period))


def accelerators(settings: Settings) -> list[Finding]:
    """Devices beside the CPU, and which device and number format a run would take."""
    import torch

    from smelt.models.devices import has_fast_bfloat16, pick_device, pick_dtype

    findings: list[Finding] = []
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        findings.append(Fact("gpu", f"cuda:{index} {device.name}, {device.total_memory / GIB:.0f} GiB"))
    if torch.backends.mps.is_available():
        findings.append(Fact("gpu", "mps (Apple)"))
    if shutil.which("nvidia-smi") and not torch.cuda.is_available():
        findings.append(Problem(f"there is an NVIDIA driver, but torch ({build()}) sees no GPU", CUDA_REMEDY))
    try:
        device_ = pick_device(settings.device)
    except ConfigError as error:
        return [*findings, Problem(str(error), "correct the setting `device`")]
    fast = "fast here" if has_fast_bfloat16(device_) else "not fast here"
    dtype = str(pick_dtype(settings.dtype, device_)).removeprefix("torch.")
    reason = f"bfloat16 is {fast}" if settings.dtype == "auto" else "as set"
    return [*findings, Fact("runs use", f"{device_}, {dtype} ({reason})")]


CUDA_REMEDY = "update the driver, or reinstall torch with CUDA: https://pytorch.org/get-started/locally"


def storage(settings: Settings) -> list[Finding]:
    """The home folder and the space on its disk."""
    folder = nearest_existing(settings.home)
    free_gib = shutil.disk_usage(folder).free / GIB
    findings: list[Finding] = [Fact("home", f"{settings.home}, {free_gib:.1f} GiB free")]
    if not (folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)):
        findings.append(Problem(f"the home folder {settings.home} cannot be written", "set SMELT_HOME to one that can"))
    if free_gib < LOW_DISK_GIB:
        findings.append(
            Problem(f"only {free_gib:.1f} GiB are free for {settings.home}", "free some, or set SMELT_HOME elsewhere")
        )
    return findings


def nearest_existing(path: Path) -> Path:
    """The path itself, or the closest folder above it that exists."""
    return next(candidate for candidate in (path, *path.parents) if candidate.exists())


def options() -> list[Finding]:
    """Optional packages, and vocabularies at hand for working offline."""
    findings: list[Finding] = [
        Fact("extra", f"{extra}: {'installed' if find_spec(module) else f'absent (pip install smelt[{extra}])'}")
        for extra, module in EXTRAS.items()
    ]
    cache = tiktoken_cache()
    if cache is None:
        return [
            *findings,
            Fact("tiktoken", "TIKTOKEN_CACHE_DIR is not set: the gpt2 tokenizer is downloaded when used"),
        ]
    if not cache.is_dir():
        return [
            *findings,
            Problem(f"TIKTOKEN_CACHE_DIR names {cache}, which is no folder", f"make it: mkdir -p {cache}"),
        ]
    return [*findings, Fact("tiktoken", f"{sum(1 for _ in cache.iterdir())} vocabularies in {cache}")]
