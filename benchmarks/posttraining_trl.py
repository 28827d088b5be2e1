"""TRL's trainers as peers of `posttraining.py`, in an environment of their own; prints seconds of each step as JSON.

    python posttraining_trl.py {sft,grpo} MODEL_FOLDER RANK THREADS {wall,cpu} NUM_STEPS

The same LoRA, bf16 weights and amounts of data as smelt gets: sft takes 4 x 256 tokens a step; grpo draws 16 answers of
64 tokens to one prompt of 16, rewards them and learns from them.
"""

import json
import random
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
COMMON: dict[str, Any] = {
    "use_cpu": True,
    "bf16": False,  # the weights are: there is nothing for autocast to do
    "gradient_checkpointing": False,
    "learning_rate": 1e-4,
    "optim": "adamw_torch_fused",
    "report_to": "none",
    "save_strategy": "no",
    "logging_strategy": "no",
    "disable_tqdm": True,
}


class StepClock(TrainerCallback):
    """Seconds of each step."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock, self.seconds, self.begun = clock, [], 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Before the first part of a step."""
        self.begun = self.clock()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """After the update."""
        self.seconds.append(self.clock() - self.begun)


class GrpoClock(StepClock):
    """TRL draws before it says that a step begins: from one end to the next, then."""

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Before the first draw."""
        self.begun = self.clock()

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Too late."""

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """After the update."""
        super().on_step_end()
        self.begun = self.clock()


def sft(model: Any, tokenizer: Any, lora: LoraConfig, clock: StepClock, num_steps: int, folder: str) -> Any:
    """A trainer on random tokens."""
    draw = random.Random(0)
    rows = [{"input_ids": [draw.randrange(model.config.vocab_size) for _ in range(256)]} for _ in range(4 * num_steps)]
    config = SFTConfig(
        output_dir=folder, per_device_train_batch_size=4, max_steps=num_steps, max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True}, **COMMON,
    )  # fmt: skip
    return SFTTrainer(
        model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, peft_config=lora,
        callbacks=[clock],
    )  # fmt: skip


def grpo(model: Any, tokenizer: Any, lora: LoraConfig, clock: StepClock, num_steps: int, folder: str) -> Any:
    """A trainer with rewards by chance."""
    draw = random.Random(0)
    config = GRPOConfig(
        output_dir=folder, per_device_train_batch_size=16, num_generations=16, max_completion_length=64, beta=0.0,
        max_steps=num_steps, generation_kwargs={"min_new_tokens": 64}, **COMMON,
    )  # fmt: skip
    return GRPOTrainer(
        model, lambda completions, **_: [draw.random() for _ in completions], args=config,
        train_dataset=Dataset.from_list([{"prompt": "abcdefghijklmnop"}] * num_steps), processing_class=tokenizer,
        peft_config=lora, callbacks=[clock],
    )  # fmt: skip


def main() -> None:
    """Train, and print the seconds."""
    kind, folder, rank, threads, clock_name, num_steps = sys.argv[1:]
    warnings.filterwarnings("ignore")
    torch.set_num_threads(int(threads))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token = tokenizer.convert_ids_to_tokens(0)
    lora = LoraConfig(r=int(rank), lora_alpha=32, target_modules=TARGETS, task_type="CAUSAL_LM")
    clock = (GrpoClock if kind == "grpo" else StepClock)(CLOCKS[clock_name])
    with tempfile.TemporaryDirectory() as out:
        make = {"sft": sft, "grpo": grpo}[kind]
        make(model, tokenizer, lora, clock, int(num_steps), out).train()
    sys.stdout.write(f"\n{json.dumps(clock.seconds)}\n")


if __name__ == "__main__":
    main()
