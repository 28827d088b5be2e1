"""Training adapters by request beside PEFT and TRL: one tenant, many with one datum each, and a step on rewards.

    python benchmarks/posttraining.py [--rounds 3] [--threads 2] [--shapes 10m 135m] [--trl-python /tmp/trl/bin/python]

Same random Llama-shaped weights in bf16, same amounts of tokens, LoRA on attention and MLP, AdamW. PEFT trains tenants
one after the other by `set_adapter`; smelt takes what waits as one pass. Rounds of the two are interleaved, and medians
are kept. TRL runs in an environment of its own (`requirements-posttraining.txt`), after them.

`--clock cpu` counts the processor's time in place of the wall's: on a machine that others use, with `--threads 1`.
"""

import argparse
import json
import os
import statistics
import subprocess
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
from smelt.data.characters import ByteTokenizer
from smelt.inference.engine import Engine
from smelt.inference.sequence import Sequence
from smelt.models.decoder import Decoder
from smelt.models.kernels import start_build
from smelt.models.weights import read_model, write_model
from smelt.settings import load_settings
from smelt.training.session import SessionTrainer, Work
from smelt.training.trained_weights import OptimSettings
from smelt.types import Datum, SamplingParams

SHAPES: dict[str, dict[str, Any]] = {
    "10m": {"vocab_size": 4096, "n_layer": 6, "n_head": 5, "n_kv_head": 5, "n_embd": 320, "n_inner": 864},
    "135m": {**PRESETS["smollm2-135m"], "vocab_size": 49152},
}
RANKS = {"10m": 8, "135m": 16}
NUM_TENANTS = (1, 4, 16, 64)
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LEARNING_RATE = 1e-4
NUM_ANSWERS, ANSWER_TOKENS, PROMPT_TOKENS = 16, 64, 16  # of a step on rewards
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


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
        self.adapters = [self.trainer.create(rank=rank, seed=seed, train_unembed=False) for seed in range(num_tenants)]
        self.engine = Engine(self.trainer.model)
        self.num_draws = 0

    def step(self, data: list[list[Datum]]) -> float:
        """One step of each tenant with its data; the loss of them all."""
        works = [Work(adapter, own, "cross_entropy") for adapter, own in zip(self.adapters, data, strict=False)]
        outcomes = self.trainer.forward_backward(works)
        for work in works:
            self.trainer.optim_step(work.trained, OptimSettings(learning_rate=LEARNING_RATE))
        return sum(outcome.metrics["loss:sum"] for outcome in outcomes if not isinstance(outcome, Exception))

    def learn_from_rewards(self) -> float:
        """Draw answers to a prompt with the first adapter as it is, reward them by chance, and learn from that."""
        self.num_draws += 1
        name, draw = f"step {self.num_draws}", np.random.default_rng(self.num_draws)
        self.engine.adapters.keep(name, self.adapters[0].as_adapter(), ())
        prompt = list(range(97, 97 + PROMPT_TOKENS))
        drawn = [
            Sequence(prompt, SamplingParams(max_tokens=ANSWER_TOKENS, seed=seed, ignore_eos=True), adapter=name)
            for seed in range(NUM_ANSWERS)
        ]
        for sequence in drawn:
            self.engine.add(sequence)
        while self.engine.has_work:
            self.engine.step()
        rewards = draw.random(NUM_ANSWERS)
        advantages = (rewards - rewards.mean()) / rewards.std()
        data = [rewarded(sequence, advantage) for sequence, advantage in zip(drawn, advantages, strict=True)]
        [outcome] = self.trainer.forward_backward([Work(self.adapters[0], data, "importance_sampling")])
        if isinstance(outcome, Exception):
            raise outcome
        self.trainer.optim_step(self.adapters[0], OptimSettings(learning_rate=LEARNING_RATE))
        return outcome.metrics["loss:sum"]


def rewarded(sequence: Sequence, advantage: float) -> Datum:
    """An answer to learn from: its prompt has no advantage."""
    tokens = [*sequence.prompt_ids, *sequence.output_ids]
    advantages, logprobs = np.zeros((2, len(tokens) - 1), np.float32)
    advantages[-len(sequence.output_ids) :] = advantage
    logprobs[-len(sequence.output_ids) :] = sequence.logprobs
    targets = np.array(tokens[1:], np.int64)
    inputs = {"target_tokens": targets, "logprobs": logprobs, "advantages": advantages}
    return Datum(np.array(tokens[:-1], np.int32), inputs)


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


def seconds_of(step: Callable[[], float], clock: Callable[[], float]) -> float:
    """Of one step."""
    begun = clock()
    step()
    return clock() - begun


def compare(
    contenders: dict[str, Any], data: list[list[Datum]], rounds: int, clock: Callable[[], float]
) -> dict[str, tuple[float, float]]:
    """Median seconds of each contender's step, in turns, and the first loss.

    A turn has a step that is not counted: it finds memory as the other contender has left it.
    """
    first = {name: each.step(data) for name, each in contenders.items()}  # warms up
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, each in contenders.items():
            each.step(data)
            taken[name].append(seconds_of(lambda each=each: each.step(data), clock))
    return {name: (statistics.median(taken[name]), first[name]) for name in contenders}


def trl_seconds(kind: str, folder: Path, rank: int, options: argparse.Namespace) -> float | None:
    """Median seconds of a TRL trainer's step after its first; None where it is not installed, or fails."""
    if options.trl_python is None:
        return None
    script = Path(__file__).with_name("posttraining_trl.py")
    arguments = [kind, folder, rank, options.threads, options.clock, options.rounds + 1]
    command = [str(options.trl_python), str(script), *map(str, arguments)]
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    if done.returncode != 0:
        print(done.stderr[-2000:], flush=True)
        return None
    return statistics.median(json.loads(done.stdout.splitlines()[-1])[1:])


def trl_rows(shape: str, folder: Path, smelt: Smelt, options: argparse.Namespace) -> list[str]:
    """The rows beside TRL: supervised, and on rewards."""
    clock, rank = CLOCKS[options.clock], RANKS[shape]
    data = [datums(4, 256, config_of(shape).vocab_size)]
    works: dict[str, tuple[str, int, Callable[[], float]]] = {
        "sft": ("SFTTrainer: 4 x 256", 1024, lambda: smelt.step(data)),
        "grpo": ("GRPOTrainer: draws 16 x 64 and learns", NUM_ANSWERS * ANSWER_TOKENS, smelt.learn_from_rewards),
    }
    rows = []
    for kind, (label, num_tokens, step) in works.items():
        theirs = trl_seconds(kind, folder, rank, options)
        step()
        ours = statistics.median(seconds_of(step, clock) for _ in range(options.rounds))
        told = "skipped | " if theirs is None else f"{num_tokens / theirs:,.0f} | {theirs / ours:.2f}x"
        rows.append(f"| {shape} r{rank} | TRL's {label} | {num_tokens / ours:,.0f} | {told} | |")
        print(rows[-1], flush=True)
    return rows


def rows_of(shape: str, dtype: torch.dtype, options: argparse.Namespace) -> list[str]:
    """The table's rows of one shape: one tenant with a batch, then many with a datum each."""
    config, rank, tenants = config_of(shape), RANKS[shape], options.tenants
    model = Decoder(config)
    model.initialize(0)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        write_model(config, {n: p.detach() for n, p in model.named_parameters()}, Path(name))
        ByteTokenizer().save(Path(name))
        works = [("PEFT: one tenant, 4 x 256", [datums(4, 256, config.vocab_size)])]
        works += [
            (f"PEFT: {n} tenants, 128 each", [[each] for each in datums(n, 128, config.vocab_size)]) for n in tenants
        ]
        for label, data in works:
            # No more adapters than take part: each that lies idle costs PEFT time.
            sides = {"smelt": Smelt, "PEFT": Peft}
            contenders = {side: make(Path(name), dtype, rank, len(data)) for side, make in sides.items()}
            found = compare(contenders, data, options.rounds, CLOCKS[options.clock])
            num_tokens = sum(len(datum.tokens) for own in data for datum in own)
            ours, theirs = found["smelt"], found["PEFT"]
            rows.append(
                f"| {shape} r{rank} | {label} | {num_tokens / ours[0]:,.0f} | {num_tokens / theirs[0]:,.0f} | "
                f"{theirs[0] / ours[0]:.2f}x | {abs(ours[1] - theirs[1]) / abs(theirs[1]):.1e} |"
            )
            print(rows[-1], flush=True)
            del contenders
        rows += trl_rows(shape, Path(name), Smelt(Path(name), dtype, rank, 1), options)
    return rows


def main() -> None:
    """Run the comparisons and keep the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--tenants", nargs="+", type=int, default=list(NUM_TENANTS))
    parser.add_argument("--trl-python", type=Path, help="of an environment with TRL; without it TRL is skipped")
    parser.add_argument("--clock", default="wall", choices=list(CLOCKS))
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(options.threads)
    start_build(load_settings().kernels)
    load = f"{os.getloadavg()[0]:.0f} processes wanted the {os.cpu_count()} cores when it began"
    table = [
        f"Tokens per second ({options.clock} time) of forward, backward and update in bf16, {options.threads} threads; "
        f"medians of {options.rounds}. {load}.",
        "",
        "| model | work | smelt | peer | ratio | loss differs by |",
        "|---|---|---|---|---|---|",
    ]
    for shape in options.shapes:
        table += rows_of(shape, torch.bfloat16, options)
    machine = describe_machine(["torch", "transformers", "peft"])
    write_result("posttraining", "Training adapters: smelt, PEFT and TRL", table, machine)


if __name__ == "__main__":
    main()
