"""What saving costs a run: the step around an asynchronous save, against a plain step and a save that waits.

python benchmarks/checkpoint.py
"""

import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
from machine import describe_machine, write_result

from smelt.configs import TrainConfig
from smelt.models.batch import Batch
from smelt.models.decoder import Decoder
from smelt.training.checkpoint import Checkpoints, TrainState
from smelt.training.losses import on_tokens
from smelt.training.optim import Optimizer
from smelt.training.step import step

ROUNDS = 7
STATE = TrainState(0, 0, None, "random", "", False, "float32", 2, 1, torch.__version__)


def main() -> None:
    """Time the four kinds of step in turns."""
    torch.set_num_threads(2)
    config = TrainConfig(preset="micro", block_size=256).decoder_config(65)
    model = Decoder(config)
    model.initialize(0)
    optimizer = Optimizer(model, torch.float32, (0.9, 0.95), 0.1, 1.0)
    rows = torch.randint(65, (8, 257), generator=torch.Generator().manual_seed(0))
    batch = Batch(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())
    loss = on_tokens("cross_entropy")

    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(Path(folder), 2, lambda _folder: None)
        saved = 0

        def save() -> None:
            nonlocal saved
            saved += 1
            checkpoints.save(model, optimizer, replace(STATE, step=saved), is_best=False)

        def plain_step() -> None:
            step(model, batch, loss, 1 / batch.num_targets)
            checkpoints.wait_until_copied()
            optimizer.step(1e-4)

        def step_with_save() -> None:
            save()
            plain_step()

        def waiting_save() -> None:
            save()
            checkpoints.wait()

        times = take_turns({"step": plain_step, "step + save": step_with_save, "save": waiting_save}, checkpoints.wait)
    report(times, config.num_parameters)


def take_turns(actions: dict[str, Callable[[], None]], settle: Callable[[], None]) -> dict[str, list[float]]:
    """Each action once a round; the first round warms up and is not counted."""
    times: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(ROUNDS + 1):
        for name, action in actions.items():
            start = time.perf_counter()
            action()
            times[name].append(time.perf_counter() - start)
            settle()
    return {name: values[1:] for name, values in times.items()}


def report(times: dict[str, list[float]], num_parameters: int) -> None:
    """The table, and its copy in `results/`."""
    lines = ["| | median ms | least | most |", "|---|---|---|---|"]
    for name, values in times.items():
        figures = " | ".join(f"{1e3 * value:,.0f}" for value in (median(values), min(values), max(values)))
        lines.append(f"| {name} | {figures} |")
    growth = median(b - a for a, b in zip(times["step"], times["step + save"], strict=True))
    lines += ["", f"the step grows by {growth / median(times['save']):.0%} of a save that waits (median of pairs)"]
    write_result("checkpoint", f"Saving {num_parameters / 1e6:.1f}M parameters", lines, describe_machine(["torch"]))


if __name__ == "__main__":
    main()
