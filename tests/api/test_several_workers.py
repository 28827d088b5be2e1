"""Sessions over two `smelt worker --connect` processes: each stays with its worker, and outlives it elsewhere."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import tinker
import torch
from sqlalchemy import select
from tinker import types

from leftovers import collected
from processes import eventually, needs_proc
from serving import Server, environment, serving, write_tiny_model
from smelt.storage.database import open_database, sqlite_url
from smelt.storage.tables import futures
from smelt.transport.addresses import socket_path

pytestmark = [
    needs_proc,
    pytest.mark.slow,
    pytest.mark.timeout(400),
    # Its client keeps sessions of its own open until the process ends.
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

DEADLINE = 120.0
MAX_SESSIONS = 24  # of which each worker gets some


@contextmanager
def worker(home: Path) -> Iterator["subprocess.Popen[bytes]"]:
    command = [sys.executable, "-m", "smelt", "worker", "--connect", str(socket_path(home))]
    process = subprocess.Popen(command, env=environment(home))
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def epochs_of(server: Server) -> dict[int, int]:
    """pid -> epoch of each worker that is connected."""
    workers = httpx.get(f"{server.url}/v1/workers").json()["data"]
    return {int(each["name"].rpartition(":")[2]): each["epoch"] for each in workers}


def epochs_by_lane(home: Path) -> dict[str, list[int]]:
    """lane -> the epochs whose workers did its operations, in order."""
    engine = open_database(sqlite_url(home / "smelt.db"))
    with engine.connect() as connection:
        query = select(futures.c.lane, futures.c.epoch).where(futures.c.state == "done").order_by(futures.c.seq)
        rows = connection.execute(query).all()
    engine.dispose()
    found: dict[str, list[int]] = {}
    for lane, epoch in rows:
        found.setdefault(lane, []).append(epoch)
    return found


def learn(training: tinker.TrainingClient) -> float:
    ids = list(b"All the world's a stage")
    inputs = {"target_tokens": torch.tensor(ids[1:]), "weights": torch.ones(len(ids) - 1)}
    datum = types.Datum(
        model_input=types.ModelInput.from_ints(ids[:-1]),
        loss_fn_inputs={name: types.TensorData.from_torch(value) for name, value in inputs.items()},
    )
    forward = training.forward_backward([datum], "cross_entropy")
    training.optim_step(types.AdamParams(learning_rate=1e-2)).result(DEADLINE)
    return forward.result(DEADLINE).metrics["loss:sum"]


def open_session(service: tinker.ServiceClient) -> tinker.TrainingClient:
    return service.create_lora_training_client("tiny", rank=4, seed=3).result(DEADLINE)


def test_each_session_stays_with_a_worker_and_outlives_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINKER_TELEMETRY", "0")
    home = tmp_path / "home"
    write_tiny_model(home / "models" / "tiny")
    with (
        collected(),
        serving(home, "--no-worker") as server,
        worker(home) as first,
        worker(home) as second,
        tinker.ServiceClient(base_url=server.url, api_key="tml-test") as service,
    ):
        eventually(lambda: {first.pid, second.pid} <= set(epochs_of(server)), "the coming of both workers", 60)
        sessions = [open_session(service) for _ in range(2)]
        while len({epoch for epochs in epochs_by_lane(home).values() for epoch in epochs}) < 2:
            assert len(sessions) < MAX_SESSIONS, "one worker gets them all"
            sessions.append(open_session(service))
        losses = [[learn(session) for session in sessions] for _ in range(3)]
        before = epochs_by_lane(home)
        assert all(len(set(epochs)) == 1 for epochs in before.values())

        doomed = epochs_of(server)[first.pid]
        os.kill(first.pid, signal.SIGKILL)
        losses += [[learn(session) for session in sessions] for _ in range(2)]
        survivor = epochs_of(server)[second.pid]
        after = epochs_by_lane(home)
        assert all(epochs[-1] == survivor for epochs in after.values())
        assert any(epochs[0] == doomed for epochs in after.values())
        with worker(home) as third:  # as if the first had come back
            eventually(lambda: third.pid in epochs_of(server), "its coming", 60)
            losses += [[learn(session) for session in sessions] for _ in range(2)]
        assert all(epochs[-1] == survivor for epochs in epochs_by_lane(home).values())
    assert all(len(set(of_step)) == 1 for of_step in losses), "all are trained alike"
    assert [of_step[0] for of_step in losses] == sorted((of_step[0] for of_step in losses), reverse=True)
