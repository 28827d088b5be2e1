"""Runs of `smelt serve` as people have them: cancelled with a checkpoint, resumed, killed, to the bits of undisturbed
ones; every process is real."""

import hashlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from processes import eventually, needs_proc
from serving import Server, serving
from smelt.control.run_folders import read_entry

pytestmark = [needs_proc, pytest.mark.slow, pytest.mark.timeout(600)]

TINY = {
    "dataset": "docs",
    "n_layer": 1,
    "n_head": 1,
    "n_embd": 16,
    "block_size": 32,
    "batch_size": 2,
    "eval_iters": 1,
    "eval_interval": 50,
    "max_iters": 400,
    "device": "cpu",
    "threads": 1,
    "compile": "false",
}
SOON_S = 120  # on a machine that does other things


class Client:
    """Asks the server, and waits."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.http = httpx.Client(base_url=server.url, timeout=60)

    def ask(self, method: str, path: str, **options: Any) -> Any:
        answer = self.http.request(method, path, **options)
        assert answer.is_success, answer.text
        return answer.json() if answer.content else None

    def start(self, **changes: Any) -> str:
        return str(self.ask("POST", "/v1/runs", json={**TINY, **changes})["id"])

    def wait(self, run_id: str, *states: str, step: int = 0) -> dict[str, Any]:
        """The run once it is in one of the states, and so far."""

        def look() -> dict[str, Any] | None:
            run: dict[str, Any] = self.ask("GET", f"/v1/runs/{run_id}")
            assert run["state"] != "failed" or "failed" in states, run["reason"]
            return run if run["state"] in states and run["step"] >= step else None

        found = eventually(look, f"{run_id} to be {' or '.join(states)}", SOON_S)
        assert found is not None
        return found


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    home = tmp_path_factory.mktemp("live") / "home"
    with serving(home) as server:
        client = Client(server)
        files = {"file": ("tale.txt", "It was the best of times, it was the worst of times.\n" * 100)}
        client.ask("POST", "/v1/datasets", data={"name": "docs", "tokenizer": "bytes", "block_size": 32}, files=files)
        assert client.ask("GET", "/v1/datasets/docs?wait=60")["state"] == "ready"
        yield client
        client.http.close()


@pytest.fixture(scope="module")
def undisturbed(client: Client) -> str:
    """The weights of a run that nobody disturbs."""
    return weights_of(client.wait(client.start(), "succeeded"))


def weights_of(run: dict[str, Any]) -> str:
    """A hash of what a run has ended with."""
    last = Path(run["out_dir"]) / "last"
    assert last.resolve().name == "step-00000400"
    return hashlib.sha256((last / "model.safetensors").read_bytes()).hexdigest()


def test_a_run_is_cancelled_with_a_checkpoint_and_resumed_to_the_same_bits(client: Client, undisturbed: str) -> None:
    run_id = client.start()
    client.wait(run_id, "running", step=10)
    assert client.http.delete("/v1/datasets/docs").status_code == 409
    client.ask("POST", f"/v1/runs/{run_id}/cancel")
    cancelled = client.wait(run_id, "cancelled")
    assert cancelled["step"] < 400
    (newest, *_) = client.ask("GET", f"/v1/runs/{run_id}/checkpoints")["data"]
    assert newest["is_last"]
    assert newest["step"] >= 10
    assert client.ask("POST", f"/v1/runs/{run_id}/resume")["state"] == "queued"
    assert weights_of(client.wait(run_id, "succeeded")) == undisturbed


def test_a_queued_run_is_taken_back_and_one_that_starts_too(client: Client) -> None:
    first = client.start(max_iters=1_000_000)
    second = client.start()
    client.wait(first, "running")
    assert client.ask("POST", f"/v1/runs/{second}/cancel")["state"] == "cancelled"
    client.ask("POST", f"/v1/runs/{first}/cancel")
    client.wait(first, "cancelled")
    third = client.start()
    client.ask("POST", f"/v1/runs/{third}/cancel")  # wherever it is on its way
    client.wait(third, "cancelled")


def test_the_worker_beside_a_run_leaves_it_memory_and_comes_first_on_the_cores(client: Client) -> None:
    def num_lent() -> int:
        (worker,) = client.ask("GET", "/v1/workers")["data"]
        return int(worker["num_lent_bytes"])

    run_id = client.start(max_iters=1_000_000)
    running = client.wait(run_id, "running", step=1)
    entry = read_entry(Path(running["out_dir"]))
    assert entry is not None
    assert entry.pid is not None
    worker = client.server.pid_of("worker")
    eventually(lambda: num_lent() > 0, "the worker to have said what it lends", SOON_S)
    assert os.getpriority(os.PRIO_PROCESS, entry.pid) > os.getpriority(os.PRIO_PROCESS, worker)
    for pid in (entry.pid, worker):  # threads that wait sleep
        assert b"OMP_WAIT_POLICY=PASSIVE" in Path(f"/proc/{pid}/environ").read_bytes()
    client.ask("POST", f"/v1/runs/{run_id}/cancel")
    client.wait(run_id, "cancelled")
    eventually(lambda: num_lent() == 0, "the worker to have its memory back", SOON_S)


def test_a_run_whose_process_or_server_is_killed_goes_on_by_itself(client: Client, undisturbed: str) -> None:
    run_id = client.start()
    running = client.wait(run_id, "running", step=60)
    entry = read_entry(Path(running["out_dir"]))
    assert entry is not None
    assert entry.pid is not None
    os.kill(entry.pid, signal.SIGKILL)
    client.wait(run_id, "running", "queued", "succeeded")
    os.kill(client.server.pid_of("api"), signal.SIGKILL)
    end = time.monotonic() + SOON_S
    while time.monotonic() < end:
        try:
            client.ask("GET", "/v1/runs")
            break
        except httpx.TransportError:
            time.sleep(0.1)
    assert weights_of(client.wait(run_id, "succeeded")) == undisturbed
