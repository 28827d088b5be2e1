"""Fine-tuning on conversations of mixed lengths, side by side with PEFT on padded batches, as Trainer makes them.

    python benchmarks/finetune.py [--rounds 5] [--threads 1] [--shape 10m] [--dtypes float32 bfloat16] [--full]

Same random Llama-shaped weights, same examples, same loss (the last third of each), LoRA of rank 16 on attention and
MLP, or all weights with --full, fused AdamW. Rounds are interleaved and medians kept. Seconds are of the processor:
then others on the machine cost neither side anything. One micro-batch is a step.
"""

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import describe_machine, write_result
from peft import LoraConfig, get_peft_model
from posttraining import TARGETS, config_of
from transformers import AutoModelForCausalLM

from smelt.data.training_examples import Sample
from smelt.models.decoder import Decoder
from smelt.models.weights import read_model, write_model
from smelt.training.example_batches import example_batch
from smelt.training.example_losses import supervised
from smelt.training.lora_factors import LoraFactors, fresh_adapter
from smelt.training.optim import Optimizer
from smelt.training.step import step
from smelt.types import Datum

RANK, ALPHA, LEARNING_RATE = 16, 32, 1e-4
BATCH_SIZE, NUM_BATCHES = 8, 3
CPU = torch.device("cpu")


def samples(vocab_size: int) -> list[Sample]:
    """Lengths as of conversations: most have around 90 tokens, a few several hundred; a third of each is learned."""
    draw = np.random.default_rng(0)
    lengths = np.clip(draw.lognormal(4.5, 0.7, BATCH_SIZE * NUM_BATCHES).astype(int), 16, 512)
    found = []
    for number, length in enumerate(lengths):
        ids = draw.integers(0, vocab_size, length + 1)
        weights = (np.arange(length) >= 2 * length // 3).astype(np.float32)
        found.append(
            Sample(f"{number}", (Datum(ids[:-1].astype(np.int32), {"target_tokens": ids[1:], "weights": weights}),))
        )
    return found


def ours(folder: Path, dtype: torch.dtype, full: bool) -> Callable[[list[Sample]], float]:
    """A step of smelt's, which returns the mean loss."""
    model = read_model(folder, torch.float32 if full else dtype).train()
    if not full:
        LoraFactors(model, fresh_adapter(model.config, RANK, ALPHA, "all", seed=0))
    optimizer = Optimizer(model, dtype, (0.9, 0.95), 0.0, 1.0)

    def run(part: list[Sample]) -> float:
        batch = example_batch(part, CPU)
        value = step(model, batch, supervised, 1 / batch.num_targets)
        optimizer.step(LEARNING_RATE)
        return float(value.total) / batch.num_targets

    return run


def theirs(folder: Path, dtype: torch.dtype, full: bool) -> Callable[[list[Sample]], float]:
    """A step of PEFT's on a batch that is filled up to its longest example."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32 if full else dtype)
    if not full:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    adamw = torch.optim.AdamW(trained, lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    model.train()

    def run(part: list[Sample]) -> float:
        longest = max(sample.num_tokens for sample in part) + 1
        ids = torch.zeros(len(part), longest, dtype=torch.int64)
        labels = torch.full_like(ids, -100)
        mask = torch.zeros_like(ids)
        for row, sample in enumerate(part):
            (datum,) = sample.data
            whole = np.append(datum.tokens, datum.inputs["target_tokens"][-1])
            ids[row, : len(whole)], mask[row, : len(whole)] = torch.from_numpy(whole.astype(np.int64)), 1
            learned = np.append(0, datum.inputs["weights"]) > 0
            labels[row, : len(whole)] = torch.from_numpy(np.where(learned, whole, -100).astype(np.int64))
        with torch.autocast("cpu", torch.bfloat16, enabled=full and dtype == torch.bfloat16):
            loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        adamw.step()
        adamw.zero_grad()
        return float(loss.detach())

    return run


def measure(runs: dict[str, Callable[[list[Sample]], float]], data: list[Sample], rounds: int) -> dict[str, float]:
    """Median seconds of each for all batches, after a first round that is not counted; their first losses agree."""
    parts = [data[first : first + BATCH_SIZE] for first in range(0, len(data), BATCH_SIZE)]
    first = {name: run(parts[0]) for name, run in runs.items()}
    assert max(first.values()) - min(first.values()) < 0.05, first
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            started = time.process_time()
            for part in parts:
                run(part)
            seconds[name].append(time.process_time() - started)
    return {name: statistics.median(each) for name, each in seconds.items()}


def main() -> None:
    """Compare in each dtype, and keep the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shape", default="10m")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--full", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    config = config_of(arguments.shape)
    data = samples(config.vocab_size)
    num_tokens = sum(sample.num_tokens for sample in data)
    table = ["| what | dtype | PEFT, tokens per CPU second | smelt | ratio |", "|---|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as folder:
        model = Decoder(config)
        model.initialize(0)
        write_model(config, model.state_dict(), Path(folder))
        for full in (False, True) if arguments.full else (False,):
            for name in arguments.dtypes:
                dtype = getattr(torch, name)
                runs = {"theirs": theirs(Path(folder), dtype, full), "ours": ours(Path(folder), dtype, full)}
                found = measure(runs, data, arguments.rounds)
                ratio = found["theirs"] / found["ours"]
                rates = " | ".join(f"{num_tokens / found[each]:,.0f}" for each in ("theirs", "ours"))
                table.append(f"| {'all weights' if full else 'LoRA'} | {name} | {rates} | {ratio:.2f} |")
    padded = sum(
        BATCH_SIZE * max(sample.num_tokens for sample in data[first : first + BATCH_SIZE])
        for first in range(0, len(data), BATCH_SIZE)
    )
    notes = [
        "",
        f"{len(data)} examples of {num_tokens:,} tokens in batches of {BATCH_SIZE}, which padding makes {padded:,}; "
        f"shape {arguments.shape} ({config.num_parameters / 1e6:.1f}M), {arguments.threads} threads.",
    ]
    title = "Fine-tuning on conversations of mixed lengths"
    write_result("finetune", title, [*table, *notes], describe_machine(["torch", "transformers", "peft"]))


if __name__ == "__main__":
    main()
