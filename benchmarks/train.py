"""Training speed: smelt against Hugging Face Trainer, from the same weights on the same batches, in turns.

Every contender is a process of its own that holds still until it is told to do some steps, so that all of them see
the same noise of the machine. Prints a table and writes it, with the machine and the versions, to `results/`.

    python benchmarks/train.py --steps 200
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from machine import describe_machine, write_result
from train_contender import CONTENDERS

from smelt.configs import DecoderConfig
from smelt.data.packing import BlockOrder
from smelt.models.decoder import Decoder
from smelt.models.devices import matmul_peak
from smelt.models.weights import write_model

SHAPE = {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256}
NUM_ROWS = 16
TURN = 5  # steps before the next contender's turn


def main() -> None:
    """Prepare, take turns, report."""
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory(prefix="smelt-bench-") as folder:
        config = prepare(Path(folder), arguments.text, max(arguments.steps, arguments.slow_steps))
        peaks = measure_peaks(arguments.threads)  # before anything else computes
        contenders = [Contender(name, Path(folder), arguments) for name in arguments.contenders]
        take_turns(contenders, arguments)
        report(contenders, config, peaks, arguments)


def parse_arguments() -> argparse.Namespace:
    """What to compare and for how long."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared = Path(__file__).parents[1].parent / "shared/data/tinyshakespeare.txt"
    parser.add_argument("--text", type=Path, default=shared, help="text to train on, by characters")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument(
        "--slow-steps", type=int, default=200, help="steps of the bf16 peer, slow where bf16 is emulated"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=list(CONTENDERS))
    return parser.parse_args()


def prepare(folder: Path, text: Path, num_steps: int, num_rows: int = NUM_ROWS) -> DecoderConfig:
    """Initial weights and the batches of every step, for all contenders alike."""
    characters, tokens = np.unique(np.array(list(text.read_text(encoding="utf-8"))), return_inverse=True)
    config = DecoderConfig(vocab_size=len(characters), **SHAPE)
    model = Decoder(config)
    model.initialize(seed=1337)
    write_model(config, dict(model.state_dict()), folder)
    order = BlockOrder(len(tokens), config.block_size, seed=1337)
    starts = order.starts(0, num_steps * num_rows).reshape(num_steps, num_rows)
    columns = np.arange(config.block_size + 1)
    np.save(folder / "batches.npy", tokens[starts[..., None] + columns].astype(np.int64))
    return config


class Contender:
    """A process that trains a few steps whenever it is asked."""

    def __init__(self, name: str, folder: Path, arguments: argparse.Namespace) -> None:
        self.name = name
        self.num_steps = arguments.slow_steps if name == "hf-bf16" else arguments.steps
        self.seconds: list[float] = []
        self.losses: list[float] = []
        script = Path(__file__).with_name("train_contender.py")
        numbers = [str(self.num_steps), str(arguments.steps), str(arguments.threads)]
        command = [sys.executable, str(script), name, str(folder), *numbers]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._read()  # it says when it is ready

    def take_turn(self) -> None:
        """Let it do some steps and note what they took."""
        num_steps = min(TURN, self.num_steps - len(self.seconds))
        if num_steps == 0:
            return
        assert self.process.stdin is not None
        self.process.stdin.write(f"{num_steps}\n")
        self.process.stdin.flush()
        for _ in range(num_steps):
            answer = self._read()
            self.seconds.append(answer["seconds"])
            self.losses.append(answer["loss"])

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended early")
        answer: dict[str, Any] = json.loads(line)
        return answer


def take_turns(contenders: list[Contender], arguments: argparse.Namespace) -> None:
    """A few steps each, round and round."""
    for done in range(0, max(arguments.steps, arguments.slow_steps), TURN):
        for contender in contenders:
            contender.take_turn()
        sys.stderr.write(
            f"\rstep {done + TURN}  " + "  ".join(f"{c.name} {tokens_per_second(c):,.0f}" for c in contenders)
        )
    sys.stderr.write("\n")


def tokens_per_second(contender: Contender) -> float:
    """At the median step, the first turn left out as warm-up."""
    counted = contender.seconds[TURN:] or contender.seconds
    return NUM_ROWS * SHAPE["block_size"] / median(counted)


def measure_peaks(num_threads: int) -> dict[torch.dtype, float]:
    """Operations per second of a large matrix product, by dtype."""
    torch.set_num_threads(num_threads)
    return {dtype: matmul_peak(torch.device("cpu"), dtype) for dtype in (torch.float32, torch.bfloat16)}


def report(
    contenders: list[Contender],
    config: DecoderConfig,
    peaks: dict[torch.dtype, float],
    arguments: argparse.Namespace,
) -> None:
    """The table, and its copy in `results/`."""
    best_peak = max(peaks.values())
    by_name = {contender.name: contender for contender in contenders}
    reference = by_name.get("hf-fp32")
    lines = [
        "| | tokens/s | MFU | x HF fp32 | x HF bf16 | max abs difference of loss | steps |",
        "|---|---|---|---|---|---|---|",
    ]
    for contender in contenders:
        pace = tokens_per_second(contender)
        cells = [contender.name, f"{pace:,.0f}", f"{pace * config.flops_per_token / best_peak:.0%}"]
        peers = [by_name.get(peer) for peer in ("hf-fp32", "hf-bf16")]
        cells += [f"{pace / tokens_per_second(peer):.2f}" if peer else "-" for peer in peers]
        cells.append(largest_difference(contender, reference))
        lines.append("| " + " | ".join([*cells, str(len(contender.seconds))]) + " |")
    lines.append("")
    lines.append(", ".join(f"{str(dtype)[6:]} matmul peak {peak / 1e9:,.0f} GF/s" for dtype, peak in peaks.items()))
    title = f"Training, {config.num_parameters / 1e6:.2f}M GPT (6 x 384), batch 16 x 256, {arguments.threads} threads"
    write_result("train", title, lines, describe_machine(["torch", "transformers", "accelerate"]))


def largest_difference(contender: Contender, reference: Contender | None) -> str:
    """Over the steps that both did."""
    if reference is None or contender is reference:
        return "-"
    pairs = zip(contender.losses, reference.losses, strict=False)
    return f"{max(abs(own - other) for own, other in pairs):.4f}"


if __name__ == "__main__":
    main()
