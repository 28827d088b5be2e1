"""One contender of `train.py`: waits for a number on stdin, does that many training steps, prints each as JSON."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from smelt.models.batch import Batch
from smelt.models.devices import pick_dtype
from smelt.models.weights import read_model
from smelt.training.compiling import compiled
from smelt.training.losses import on_tokens
from smelt.training.optim import Optimizer, cosine_with_warmup
from smelt.training.step import step

SETTINGS = {"betas": (0.9, 0.95), "weight_decay": 0.1}
GRAD_CLIP = 1.0


def learning_rate(step_number: int, num_steps: int) -> float:
    """The schedule of every contender."""
    return cosine_with_warmup(step_number, 1e-3, 1e-4, num_steps // 20, num_steps)


def say(**values: float) -> None:
    """One line for the parent."""
    sys.stdout.write(json.dumps(values) + "\n")
    sys.stdout.flush()


def turns() -> Iterator[None]:
    """Yields once per step that the parent asks for."""
    for line in sys.stdin:
        for _ in range(int(line)):
            yield


def train_smelt(folder: Path, num_steps: int, schedule_steps: int, dtype_name: str, is_compiled: bool) -> None:
    """The step that `smelt train` takes, without evaluation and checkpoints."""
    batches = torch.from_numpy(np.load(folder / "batches.npy"))
    model = read_model(folder).train()
    dtype = pick_dtype(dtype_name, torch.device("cpu"))
    optimizer = Optimizer(model, dtype, SETTINGS["betas"], SETTINGS["weight_decay"], GRAD_CLIP)
    loss = compiled(on_tokens("cross_entropy"), []) if is_compiled else on_tokens("cross_entropy")
    asked = turns()
    say(ready=1)
    for number, rows in enumerate(batches[:num_steps]):
        next(asked)
        start = time.perf_counter()
        batch = Batch(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())
        num_tokens = batch.tokens.numel()
        value = float(step(model, batch, loss, 1 / num_tokens).total) / num_tokens
        optimizer.step(learning_rate(number, schedule_steps))
        say(seconds=time.perf_counter() - start, loss=value)


def train_hugging_face(folder: Path, num_steps: int, schedule_steps: int, is_bfloat16: bool) -> None:
    """GPT2LMHeadModel under Trainer, fp32 or bf16 autocast; only schedule and data are given to it."""
    from torch.utils.data import SequentialSampler
    from transformers import PrinterCallback, Trainer, TrainingArguments

    batches = np.load(folder / "batches.npy")
    rows = list(torch.from_numpy(batches.reshape(-1, batches.shape[-1])))

    class InOrder(Trainer):
        def _get_train_sampler(self, *_args: Any) -> SequentialSampler:
            return SequentialSampler(rows)

    arguments = TrainingArguments(
        output_dir=str(folder / f"hf-{is_bfloat16}"),
        per_device_train_batch_size=batches.shape[1],
        max_steps=num_steps,
        max_grad_norm=GRAD_CLIP,
        bf16=is_bfloat16,
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    model = hugging_face_model(folder)
    trainer = InOrder(
        model,
        arguments,
        data_collator=collate,
        train_dataset=rows,
        optimizers=hugging_face_optimizer(model, schedule_steps),
        callbacks=[hugging_face_turns()],
    )
    trainer.remove_callback(PrinterCallback)
    say(ready=1)
    trainer.train()


def collate(rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Targets are given shifted already, so that no position goes unused."""
    tokens = torch.stack(rows)
    targets = tokens[:, 1:].contiguous()
    return {"input_ids": tokens[:, :-1].contiguous(), "labels": targets, "shift_labels": targets}


def hugging_face_model(folder: Path) -> torch.nn.Module:
    """The same weights, without dropout."""
    from transformers import GPT2LMHeadModel

    settings = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "use_cache": False}
    return GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32, **settings)


def hugging_face_optimizer(model: torch.nn.Module, num_steps: int) -> tuple[Any, Any]:
    """Fused AdamW with the shared settings and schedule."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1.0, fused=True, **SETTINGS)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda number: learning_rate(number, num_steps))


def hugging_face_turns() -> Any:
    """A callback that waits for its turn before each step and reports after it."""
    from transformers import TrainerCallback

    class Turns(TrainerCallback):
        def __init__(self) -> None:
            self.asked = turns()
            self.start = 0.0
            self.seconds = 0.0

        def on_step_begin(self, *_args: Any, **_kwargs: Any) -> None:
            next(self.asked)
            self.start = time.perf_counter()

        def on_step_end(self, *_args: Any, **_kwargs: Any) -> None:
            self.seconds = time.perf_counter() - self.start

        def on_log(self, _args: Any, _state: Any, _control: Any, logs: dict[str, float], **_kwargs: Any) -> None:
            if "loss" in logs:
                say(seconds=self.seconds, loss=float(logs["loss"]))

    return Turns()


CONTENDERS: dict[str, Callable[[Path, int, int], None]] = {
    "smelt": partial(train_smelt, dtype_name="auto", is_compiled=False),
    "smelt-compiled": partial(train_smelt, dtype_name="auto", is_compiled=True),
    "hf-fp32": partial(train_hugging_face, is_bfloat16=False),
    "hf-bf16": partial(train_hugging_face, is_bfloat16=True),
}


if __name__ == "__main__":
    name, folder, *numbers = sys.argv[1:]
    num_steps, schedule_steps, num_threads = map(int, numbers)
    torch.set_num_threads(num_threads)
    CONTENDERS[name](Path(folder), num_steps, schedule_steps)
