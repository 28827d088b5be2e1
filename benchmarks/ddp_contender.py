"""One rank of one contender of `ddp.py`: waits for a number on stdin, does that many steps, prints each as JSON."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from train_contender import GRAD_CLIP, SETTINGS, say, turns

from smelt.models.batch import Batch
from smelt.models.devices import pick_dtype
from smelt.models.weights import read_model
from smelt.training.gradient_sum import GradientSum
from smelt.training.losses import on_tokens
from smelt.training.optim import Optimizer
from smelt.training.parallel import Ranks, describe_rank, join, read_ranks, threads_per_rank
from smelt.training.step import step

LEARNING_RATE = 3e-4
MICRO_ROWS = 16
Step = Callable[[list[Tensor]], float]  # of this rank's micro-batches (rows, T + 1); its share of the mean loss


def smelt_step(folder: Path, ranks: Ranks) -> Step:
    """The step of `smelt train`: fp32 sums of bf16 gradients, added over ranks in buckets during the last backward."""
    model = read_model(folder).train()
    dtype = pick_dtype("auto", torch.device("cpu"))
    optimizer = Optimizer(model, dtype, SETTINGS["betas"], SETTINGS["weight_decay"], GRAD_CLIP)
    gradient_sum = GradientSum(model, optimizer, ranks)
    loss = on_tokens("cross_entropy")

    def take(micro_batches: list[Tensor]) -> float:
        num_tokens = sum(rows.shape[0] * (rows.shape[1] - 1) for rows in micro_batches) * ranks.world_size
        total = 0.0
        for index, rows in enumerate(micro_batches):
            if index == len(micro_batches) - 1:
                gradient_sum.begin()
            batch = Batch(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())
            total += float(step(model, batch, loss, 1 / num_tokens).total)
        gradient_sum.finish()
        optimizer.step(LEARNING_RATE)
        return total / num_tokens

    return take


def plain_step(folder: Path, ranks: Ranks) -> Step:
    """What people write: bf16 autocast, DistributedDataParallel, `no_sync` but for the last, clip, fused AdamW."""
    model = read_model(folder).train()
    wrapped = DistributedDataParallel(model) if ranks.world_size > 1 else model
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=LEARNING_RATE, fused=True, **SETTINGS)

    def take(micro_batches: list[Tensor]) -> float:
        total = 0.0
        for index, rows in enumerate(micro_batches):
            is_last = index == len(micro_batches) - 1
            waits = wrapped.no_sync() if ranks.world_size > 1 and not is_last else nullcontext()
            with waits:
                with torch.autocast("cpu", torch.bfloat16):
                    hidden = wrapped(Batch(rows[:, :-1].contiguous(), None))
                    logits = model.logits(hidden)
                targets = rows[:, 1:].reshape(-1)
                loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets) / len(micro_batches)
                loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(wrapped.parameters(), GRAD_CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return total / ranks.world_size

    return take


STEPS = {"smelt": smelt_step, "plain": plain_step}


def own_micro_batches(folder: Path, ranks: Ranks) -> Iterator[list[Tensor]]:
    """This rank's rows of each step, a full micro-batch at a time or all there are."""
    batches = torch.from_numpy(np.load(folder / "batches.npy"))
    for rows in batches:
        yield list(rows[ranks.rows(len(rows))].split(MICRO_ROWS))


def main() -> None:
    """Take part until stdin ends."""
    name, folder, rank, num_ranks, num_threads = sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:6])
    if num_ranks > 1:
        describe_rank(rank, num_ranks, sys.argv[6])
    ranks = read_ranks(num_ranks)
    torch.set_num_threads(threads_per_rank(ranks, num_threads))
    with join(ranks, torch.device("cpu")):
        take = STEPS[name](folder, ranks)
        if ranks.is_main:
            say(ready=1)
        for _, micro_batches in zip(turns(), own_micro_batches(folder, ranks), strict=False):
            start = time.perf_counter()
            loss = torch.tensor(take(micro_batches))
            seconds = time.perf_counter() - start
            mean = float(ranks.sum_(loss))
            if ranks.is_main:
                say(seconds=seconds, loss=mean)


if __name__ == "__main__":
    main()
