"""Speed of two ranks on one machine against one process with as many threads, and of plain DDP; in turns.

The global batch is the same for all. Every contender holds still until it is told to do a step, so that all of them
see the same noise of the machine. Prints a table and writes it, with the machine and the versions, to `results/`.

    python benchmarks/ddp.py --steps 12
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from machine import describe_machine, write_result
from train import NUM_ROWS, SHAPE, prepare

THREADS = 2  # of all ranks of a contender together
WARM_UP = 2  # steps that do not count
CONTENDERS = [("smelt", 1), ("smelt", 2), ("plain", 1), ("plain", 2)]


class Contender:
    """The ranks that do a step whenever they are asked."""

    def __init__(self, name: str, num_ranks: int, folder: Path) -> None:
        self.title = f"{name}, {num_ranks} x {THREADS // num_ranks}"
        self.seconds: list[float] = []
        self.losses: list[float] = []
        meeting = (folder / f"meeting-{name}").as_uri()
        script = str(Path(__file__).with_name("ddp_contender.py"))
        numbers = [str(num_ranks), str(THREADS)]
        self.ranks = [
            subprocess.Popen(
                [sys.executable, script, name, str(folder), str(rank), *numbers, meeting],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(num_ranks)
        ]
        self._read()  # it says when it is ready

    def take_turn(self) -> None:
        """One step."""
        for rank in self.ranks:
            assert rank.stdin is not None
            rank.stdin.write("1\n")
            rank.stdin.flush()
        answer = self._read()
        self.seconds.append(answer["seconds"])
        self.losses.append(answer["loss"])

    def end(self) -> None:
        """No more turns."""
        for rank in self.ranks:
            assert rank.stdin is not None
            rank.stdin.close()
        for rank in self.ranks:
            rank.wait()

    def _read(self) -> dict[str, float]:
        assert self.ranks[0].stdout is not None
        line = self.ranks[0].stdout.readline()
        if not line:
            raise SystemExit(f"{self.title} ended early")
        answer: dict[str, float] = json.loads(line)
        return answer


def measured(accumulation: int, num_steps: int, text: Path) -> list[Contender]:
    """All contenders after their turns."""
    with tempfile.TemporaryDirectory(prefix="smelt-bench-") as name:
        folder = Path(name)
        prepare(folder, text, num_steps, NUM_ROWS * accumulation)
        contenders = [Contender(name, num_ranks, folder) for name, num_ranks in CONTENDERS]
        for done in range(num_steps):
            for contender in contenders:
                contender.take_turn()
            paces = "  ".join(f"{c.title} {median(c.seconds[WARM_UP:] or c.seconds):.2f} s" for c in contenders)
            sys.stderr.write(f"\raccumulation {accumulation}, step {done + 1}  {paces}")
        sys.stderr.write("\n")
        for contender in contenders:
            contender.end()
    return contenders


def lines_of(accumulation: int, contenders: list[Contender]) -> list[str]:
    """A line of the table for each contender, against the one-process contender of its kind."""
    tokens = NUM_ROWS * accumulation * SHAPE["block_size"]
    lines = []
    for alone, contender in zip([contenders[0]] * 2 + [contenders[2]] * 2, contenders, strict=True):
        # Neighbours in time are compared, so that a noisy minute is in both.
        ratios = [one / own for one, own in zip(alone.seconds[WARM_UP:], contender.seconds[WARM_UP:], strict=True)]
        seconds = median(contender.seconds[WARM_UP:])
        difference = max(abs(a - b) for a, b in zip(alone.losses, contender.losses, strict=True))
        cells = [contender.title, str(accumulation), f"{seconds:.2f}", f"{tokens / seconds:,.0f}"]
        cells += [f"{median(ratios):.2f}", f"{min(alone.seconds) / min(contender.seconds):.2f}", f"{difference:.4f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    """Measure at accumulation 1 and 4, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared = Path(__file__).parents[1].parent / "shared/data/tinyshakespeare.txt"
    parser.add_argument("--text", type=Path, default=shared, help="text to train on, by characters")
    parser.add_argument("--steps", type=int, default=12)
    arguments = parser.parse_args()
    lines = [
        "| ranks x threads | accumulation | s/step | tokens/s | x one process | x, best step | difference of loss |",
        "|---|---|---|---|---|---|---|",
    ]
    for accumulation in (1, 4):
        lines += lines_of(accumulation, measured(accumulation, arguments.steps, arguments.text))
    title = "Two ranks against one process, 10.66M GPT (6 x 384), rows of 256, 16 rows x accumulation"
    write_result("ddp", title, lines, describe_machine(["torch"]))


if __name__ == "__main__":
    main()
