"""How long a step of training by request takes through the real client: both its calls sent, then both awaited.

    python benchmarks/session_latency.py [--pairs 200] [--clients 1 8] [--threads 2]

A model of 0.4 million parameters, a datum of 64 tokens, LoRA r8. The last column is the same work asked of the trainer
in this process, without a server: what is above it is the protocol, the ledger with its fsync, and three processes.
"""

import argparse
import statistics
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import tinker
import torch
from machine import describe_machine, write_result
from serving_http import running
from tinker import types

from serving import make_model
from smelt.configs import DecoderConfig
from smelt.models.kernels import start_build
from smelt.models.weights import read_model
from smelt.settings import Settings
from smelt.training.session import SessionTrainer, Work
from smelt.training.trained_weights import OptimSettings
from smelt.types import Datum

SHAPE = {
    "vocab_size": 1024,
    "block_size": 512,
    "n_layer": 2,
    "n_head": 4,
    "n_kv_head": 4,
    "n_embd": 112,
    "n_inner": 304,
}
NUM_TOKENS, RANK, LEARNING_RATE = 64, 8, 1e-3
NUM_WARM_UP = 20
TOKENS = np.random.default_rng(0).integers(1, SHAPE["vocab_size"], NUM_TOKENS + 1)


def main() -> None:
    """A row for each number of clients."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=200, help="of each client")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", ResourceWarning)
    lines = ["| clients | p50 ms | p95 ms | p99 ms | pairs/s | trainer alone, p50 ms |", "|---|---|---|---|---|---|"]
    with tempfile.TemporaryDirectory(prefix="smelt-bench-") as folder:
        model, home = Path(folder) / "model", Path(folder) / "home"
        make_model(model, DecoderConfig(**SHAPE))
        home.mkdir()
        alone = 1000 * statistics.median(without_a_server(model, arguments.pairs, arguments.threads))
        with running("smelt serve", model, home, arguments.threads) as address:
            for num_clients in arguments.clients:
                times, seconds = by_clients(address.removesuffix("/v1"), str(model), num_clients, arguments.pairs)
                p50, p95, p99 = (1000 * figure for figure in np.percentile(times, [50, 95, 99]))
                row = [f"{p50:.1f}", f"{p95:.1f}", f"{p99:.1f}", f"{len(times) / seconds:.0f}", f"{alone:.1f}"]
                lines.append(f"| {num_clients} | " + " | ".join(row) + " |")
                sys.stderr.write(f"{lines[-1]}\n")
    title = (
        f"A pair of forward_backward and optim_step through the client, 0.4M parameters, {arguments.threads} threads"
    )
    write_result("session_latency", title, [*lines, ""], describe_machine(["torch", "tinker"]))


def without_a_server(model: Path, num_pairs: int, num_threads: int) -> list[float]:
    """Seconds of each pair, asked of the trainer."""
    torch.set_num_threads(num_threads)
    start_build(Path(Settings().kernels))
    trainer = SessionTrainer(read_model(model, torch.bfloat16))
    adapter = trainer.create(rank=RANK, seed=0)
    datum = Datum(TOKENS[:-1].astype(np.int32), {"target_tokens": TOKENS[1:].astype(np.int64)})
    times = []
    for _ in range(NUM_WARM_UP + num_pairs):
        start = time.perf_counter()
        trainer.forward_backward([Work(adapter, [datum], "cross_entropy")])
        trainer.optim_step(adapter, OptimSettings(learning_rate=LEARNING_RATE))
        times.append(time.perf_counter() - start)
    return times[NUM_WARM_UP:]


def by_clients(address: str, base: str, num_clients: int, num_pairs: int) -> tuple[list[float], float]:
    """Seconds of each pair of all clients, and in all: each has a session and an adapter of its own."""
    times: list[float] = []
    ready = threading.Barrier(num_clients + 1)
    clients = [
        threading.Thread(target=train, args=(address, base, num_pairs, ready, times)) for _ in range(num_clients)
    ]
    for client in clients:
        client.start()
    ready.wait()
    start = time.perf_counter()
    for client in clients:
        client.join()
    return times, time.perf_counter() - start


def train(address: str, base: str, num_pairs: int, ready: threading.Barrier, times: list[float]) -> None:
    """Append the seconds of each pair."""
    data = [
        types.Datum(
            model_input=types.ModelInput.from_ints(TOKENS[:-1].tolist()),
            loss_fn_inputs={"target_tokens": types.TensorData.from_numpy(TOKENS[1:].astype(np.int64))},
        )
    ]
    with tinker.ServiceClient(base_url=address, api_key="tml-bench") as service:
        training = service.create_lora_training_client(base, rank=RANK, seed=0).result()
        for number in range(NUM_WARM_UP + num_pairs):
            if number == NUM_WARM_UP:
                ready.wait()
            start = time.perf_counter()
            promises = [
                training.forward_backward(data, "cross_entropy"),
                training.optim_step(types.AdamParams(learning_rate=LEARNING_RATE)),
            ]
            for promise in promises:
                promise.result()
            if number >= NUM_WARM_UP:
                times.append(time.perf_counter() - start)


if __name__ == "__main__":
    main()
