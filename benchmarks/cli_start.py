"""How long `smelt --help` takes to appear, beside a Python that does nothing; the two take turns."""

import subprocess
import sys
import time
from statistics import median

from machine import describe_machine, write_result

ROUNDS = 40
COMMANDS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "import click": [sys.executable, "-c", "import click"],
    "smelt --help": [sys.executable, "-m", "smelt", "--help"],
    "smelt train --help": [sys.executable, "-m", "smelt", "train", "--help"],
}


def seconds(command: list[str]) -> float:
    """Wall time from start to end of a process."""
    start = time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


def measure() -> dict[str, list[float]]:
    """Seconds of each command in each round; the commands take turns, so that noise meets all of them."""
    for command in COMMANDS.values():
        seconds(command)  # once to warm the file cache
    rounds = [{name: seconds(command) for name, command in COMMANDS.items()} for _ in range(ROUNDS)]
    return {name: sorted(one[name] for one in rounds) for name in COMMANDS}


def main() -> None:
    """Measure, print, and keep the table."""
    table = ["| command | median ms | fastest | 95% |", "|---|---|---|---|"]
    for name, times in measure().items():
        p95 = times[int(len(times) * 0.95)]
        table.append(f"| `{name}` | {1000 * median(times):.0f} | {1000 * times[0]:.0f} | {1000 * p95:.0f} |")
    write_result("cli_start", "Start of the command line", table, describe_machine(["click", "pydantic"]))


if __name__ == "__main__":
    main()
