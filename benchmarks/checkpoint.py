"""What saving costs a run: the step around an asynchronous save, and the one after it, against a save that waits.

python benchmarks/checkpoint.py [--rounds 15] [--threads 2]
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
from machine import describe_machine, write_result

from smelt.models.batch import Batch
from smelt.models.decoder import Decoder
from smelt.run_configs import TrainConfig
from smelt.training.checkpoint import Checkpoints, TrainState
from smelt.training.losses import on_tokens
from smelt.training.optim import Optimizer
from smelt.training.pretraining import model_files
from smelt.training.step import step

STATE = TrainState(0, 0, None, "random", "", False, "float32", 2, 1, torch.__version__)
LOSS = on_tokens("cross_entropy")
PLAIN, AROUND, AFTER, WAITING = "step", "step around a save", "the step after it", "save that waits"


def main() -> None:
    """Time the four in turns."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        bench = Bench(Path(folder))
        times = take_turns(bench.actions(), bench.checkpoints.wait, arguments.rounds)
    report(times, bench.model.config.num_parameters, arguments.threads)


def parse_arguments() -> argparse.Namespace:
    """Rounds, threads and where to write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", help="on the disk to measure (the system's temporary folder)")
    return parser.parse_args()


class Bench:
    """A run in miniature: the 10.8M shape on random tokens, and its checkpoints."""

    def __init__(self, folder: Path) -> None:
        self.model = Decoder(TrainConfig(preset="micro", block_size=256).decoder_config(65))
        self.model.initialize(0)
        self.optimizer = Optimizer(self.model, torch.float32, (0.9, 0.95), 0.1, 1.0)
        rows = torch.randint(65, (8, 257), generator=torch.Generator().manual_seed(0))
        self.batch = Batch(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())
        self.checkpoints = Checkpoints(folder, 2, model_files(self.model.config, None))
        self.num_saves = 0

    def actions(self) -> dict[str, tuple[Callable[[], None], bool]]:
        """What to time, and whether the save must be on the disk before the next begins."""
        return {
            PLAIN: (self.step, True),
            AROUND: (self.step_around_a_save, False),
            AFTER: (self.step, True),
            WAITING: (self.waiting_save, True),
        }

    def save(self) -> None:
        """Begin to save as if the last save were 250 s ago, as it is in a run of such steps."""
        self.num_saves += 1
        self.checkpoints.begun_at -= 250
        self.checkpoints.save(self.optimizer, replace(STATE, step=self.num_saves), is_best=False)

    def step(self) -> None:
        """A step as the loop takes it."""
        step(self.model, self.batch, LOSS, 1 / self.batch.num_targets)
        self.checkpoints.wait_until_copied()
        self.optimizer.step(1e-4)

    def step_around_a_save(self) -> None:
        """What a run pays for."""
        self.save()
        self.step()

    def waiting_save(self) -> None:
        """Nothing but the save, until it is on the disk."""
        self.save()
        self.checkpoints.wait()


def take_turns(
    actions: dict[str, tuple[Callable[[], None], bool]], settle: Callable[[], None], num_rounds: int
) -> dict[str, list[float]]:
    """Each action once a round; the first round warms up and is not counted."""
    times: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(num_rounds + 1):
        for name, (action, settles) in actions.items():
            start = time.perf_counter()
            action()
            times[name].append(time.perf_counter() - start)
            if settles:
                settle()
    return {name: values[1:] for name, values in times.items()}


def report(times: dict[str, list[float]], num_parameters: int, num_threads: int) -> None:
    """The table, and its copy in `results/`."""
    lines = ["| | median ms | least | most |", "|---|---|---|---|"]
    for name, values in times.items():
        figures = " | ".join(f"{1e3 * value:,.0f}" for value in (median(values), min(values), max(values)))
        lines.append(f"| {name} | {figures} |")
    lines.append("")
    whole = median(times[WAITING])
    for name in (AROUND, AFTER):
        growth = median(after - before for before, after in zip(times[PLAIN], times[name], strict=True))
        lines.append(f"- {name} is {1e3 * growth:,.0f} ms longer: {growth / whole:.0%} of a save that waits")
    lines += ["", f"Medians of {len(times[PLAIN])} rounds; growth is the median of the differences within a round."]
    title = f"Saving {num_parameters / 1e6:.1f}M parameters beside {num_threads} threads of training"
    write_result("checkpoint", title, lines, describe_machine(["torch"]))


if __name__ == "__main__":
    main()
