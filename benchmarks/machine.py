"""What machine and which versions a benchmark ran with, and where its results go."""

import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from smelt.models.devices import cpu_features, cpu_name

RESULTS = Path(__file__).with_name("results")


def describe_machine(packages: list[str]) -> list[str]:
    """Lines naming CPU, instruction sets, accelerator, versions and commit."""
    features = ", ".join(name for name, here in cpu_features().items() if here)
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return [
        f"- {cpu_name()}, {len_of_affinity()} cores; {features}",
        f"- accelerator: {', '.join(gpus) or 'none'}",
        f"- Python {platform.python_version()}, " + ", ".join(f"{name} {version_of(name)}" for name in packages),
        f"- commit {commit()}, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
    ]


def len_of_affinity() -> int:
    """Cores this process may use."""
    from smelt.training.parallel import num_cores

    return num_cores()


def version_of(package: str) -> str:
    """Installed version, or that there is none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def commit() -> str:
    """The checkout's commit, marked where the tree differs from it."""
    done = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def write_result(name: str, title: str, table: list[str], machine: list[str]) -> Path:
    """Print a table and keep it as `results/NAME-DATE.md`."""
    text = "\n".join([f"# {title}", "", *table, "", *machine, ""])
    path = RESULTS / f"{name}-{datetime.now(UTC):%Y-%m-%d}.md"
    path.write_text(text, encoding="utf-8")
    sys.stdout.write(f"{text}\nwritten to {path}\n")
    return path
