"""Training adapters by request, side by side with PEFT: one tenant, and many of them with one datum each.

    python benchmarks/posttraining.py [--rounds 3] [--threads 2] [--shapes 10m 135m] [--dtype bfloat16]

Same random Llama-shaped weights, same tokens, LoRA on attention and MLP, AdamW. PEFT trains tenants one after the
other by `set_adapter`; smelt takes what waits as one pass. Rounds are interleaved, and medians are kept.
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
from transformers import AutoModelForCausalLM

from smelt.configs import PRESETS, DecoderConfig
from smelt.models.decoder import Decoder
from smelt.models.weights import read_model, write_model
from smelt.training.session import SessionTrainer, Work
from smelt.training.trained_weights import OptimSettings
from smelt.types import Datum

SHAPES: dict[str, dict[str, Any]] = {
    "10m": {"vocab_size": 4096, "n_layer": 6, "n_head": 5, "n_kv_head": 5, "n_embd": 320, "n_inner": 864},
    "135m": {**PRESETS["smollm2-135m"], "vocab_size": 49152},
}
RANKS = {"10m": 8, "135m": 16}
NUM_TENANTS = (1, 4, 16, 64)
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LEARNING_RATE = 1e-4


def config_of(shape: str) -> DecoderConfig:
    """The decoder of a shape's name."""
    return DecoderConfig(**{**PRESETS["nano-llama"], "block_size": 2048, **SHAPES[shape]})


def datums(num: int, num_tokens: int, vocab_size: int) -> list[Datum]:
    """Random tokens with a target at each place."""
    draw = np.random.default_rng(0)
    rows = draw.integers(0, vocab_size, (num, num_tokens + 1))
    return [Datum(row[:-1].astype(np.int32), {"target_tokens": row[1:].astype(np.int64)}) for row in rows]


class Smelt:
    """Sessions on one model; a step of all tenants is one pass and an update each."""

    def __init__(self, folder: Path, dtype: torch.dtype, rank: int, num_tenants: int) -> None:
        self.trainer = SessionTrainer(read_model(folder, dtype))
        self.adapters = [self.trainer.create(rank=rank, seed=seed) for seed in range(num_tenants)]

    def step(self, data: list[list[Datum]]) -> float:
        """One step of each tenant with its data; the loss of them all."""
        works = [Work(adapter, own, "cross_entropy") for adapter, own in zip(self.adapters, data, strict=False)]
        outcomes = self.trainer.forward_backward(works)
        for work in works:
            self.trainer.optim_step(work.trained, OptimSettings(learning_rate=LEARNING_RATE))
        return sum(outcome.metrics["loss:sum"] for outcome in outcomes if not isinstance(outcome, Exception))


class Peft:
    """transformers with PEFT: an adapter of its own for each tenant, and an optimizer."""

    def __init__(self, folder: Path, dtype: torch.dtype, rank: int, num_tenants: int) -> None:
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        settings = LoraConfig(r=rank, lora_alpha=32, target_modules=TARGETS, task_type="CAUSAL_LM")
        self.model = get_peft_model(base, settings, adapter_name="0", autocast_adapter_dtype=False)
        for tenant in range(1, num_tenants):
            self.model.add_adapter(str(tenant), settings)
        self.optimizers = [self._optimizer(str(tenant)) for tenant in range(num_tenants)]

    def _optimizer(self, name: str) -> torch.optim.Optimizer:
        own = [p for n, p in self.model.named_parameters() if f".{name}.weight" in n and "lora_" in n]
        return torch.optim.AdamW(own, lr=LEARNING_RATE, weight_decay=0.0, fused=True)

    def step(self, data: list[list[Datum]]) -> float:
        """One step of each tenant, one after the other."""
        total = 0.0
        for tenant, own in enumerate(data):
            self.model.set_adapter(str(tenant))
            tokens = torch.tensor(np.stack([datum.tokens for datum in own])).long()
            targets = torch.tensor(np.stack([datum.inputs["target_tokens"] for datum in own]))
            logits = self.model(input_ids=tokens).logits.float()
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
            loss.backward()
            self.optimizers[tenant].step()
            self.optimizers[tenant].zero_grad()
            total += float(loss.detach())
        return total


def seconds_of(step: Callable[[], float]) -> tuple[float, float]:
    """(seconds, loss) of one step."""
    begun = time.perf_counter()
    loss = step()
    return time.perf_counter() - begun, loss


def compare(contenders: dict[str, Any], data: list[list[Datum]], rounds: int) -> dict[str, tuple[float, float]]:
    """Median seconds of each contender's step, in turns, and the first loss."""
    first = {name: each.step(data) for name, each in contenders.items()}  # warms up
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, each in contenders.items():
            taken[name].append(seconds_of(lambda each=each: each.step(data))[0])
    return {name: (statistics.median(taken[name]), first[name]) for name in contenders}


def rows_of(shape: str, dtype: torch.dtype, rounds: int, tenants: list[int]) -> list[str]:
    """The table's rows of one shape: one tenant with a batch, then many with a datum each."""
    config, rank = config_of(shape), RANKS[shape]
    model = Decoder(config)
    model.initialize(0)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        write_model(config, {n: p.detach() for n, p in model.named_parameters()}, Path(name))
        sides = {"smelt": Smelt, "PEFT": Peft}
        contenders = {side: make(Path(name), dtype, rank, max(tenants)) for side, make in sides.items()}
        works = [("one tenant, 4 x 256", [datums(4, 256, config.vocab_size)])]
        works += [(f"{n} tenants, 128 each", [[each] for each in datums(n, 128, config.vocab_size)]) for n in tenants]
        for label, data in works:
            found = compare(contenders, data, rounds)
            num_tokens = sum(len(datum.tokens) for own in data for datum in own)
            ours, theirs = found["smelt"], found["PEFT"]
            rows.append(
                f"| {shape} r{rank} | {label} | {num_tokens / ours[0]:,.0f} | {num_tokens / theirs[0]:,.0f} | "
                f"{theirs[0] / ours[0]:.2f}x | {abs(ours[1] - theirs[1]) / abs(theirs[1]):.1e} |"
            )
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Run the comparisons and keep the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--tenants", nargs="+", type=int, default=list(NUM_TENANTS))
    parser.add_argument("--dtype", default="bfloat16")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype)
    table = [
        f"Tokens per second of forward, backward and update in {options.dtype}; medians of {options.rounds}.",
        "",
        "| model | work | smelt | PEFT | ratio | loss differs by |",
        "|---|---|---|---|---|---|",
    ]
    for shape in options.shapes:
        table += rows_of(shape, dtype, options.rounds, options.tenants)
    machine = describe_machine(["torch", "transformers", "peft"])
    write_result("posttraining", "Training adapters: smelt and PEFT", table, machine)


if __name__ == "__main__":
    main()
