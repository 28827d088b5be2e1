"""How long a step of a config takes on this machine, found by taking some; knows no dataset."""

import time
from statistics import median

import torch

from smelt.models.batch import Batch
from smelt.models.decoder import Decoder
from smelt.models.devices import pick_device, pick_dtype, synchronize
from smelt.run_configs import TrainConfig
from smelt.training.losses import on_tokens
from smelt.training.optim import Optimizer
from smelt.training.parallel import read_ranks, threads_per_rank
from smelt.training.step import step


def seconds_per_step(config: TrainConfig, vocab_size: int, for_seconds: float = 1.5) -> float:
    """Median time of an optimizer step on random tokens, measured for about this long after two warm-up steps."""
    torch.set_num_threads(threads_per_rank(read_ranks(), config.threads))
    device = pick_device(config.device)
    model = Decoder(config.decoder_config(vocab_size), config.dropout).to(device)
    model.initialize(config.seed)
    optimizer = Optimizer(model, pick_dtype(config.dtype, device), config.betas, 0.0, config.grad_clip)
    rows = torch.randint(vocab_size, (config.batch_size, model.config.block_size + 1), device=device)
    batch = Batch(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())
    loss = on_tokens("cross_entropy")
    times: list[float] = []
    while len(times) < 5 or sum(times) < for_seconds:
        start = time.perf_counter()
        for _ in range(config.gradient_accumulation_steps):
            step(model, batch, loss, 1 / batch.tokens.numel())
        optimizer.step(learning_rate=0.0)
        synchronize(device)
        times.append(time.perf_counter() - start)
    return median(times[2:])
