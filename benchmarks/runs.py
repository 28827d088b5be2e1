"""How long a server takes to accept a run, to list runs, and to take one back: requests one after the other.

The API's own process, supervised by nobody: no launcher takes the runs, so that nothing else is measured.

    python benchmarks/runs.py [--requests 200]
"""

import argparse
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import httpx
from machine import describe_machine, write_result

from smelt.data.preparation import prepare

CONFIG = {"dataset": "docs", "preset": "nano", "max_iters": 100}
READY_SECONDS = 60.0


def milliseconds(ask: Callable[[int], httpx.Response], num_requests: int) -> list[float]:
    """The wall time of each request, sorted."""
    times = []
    for number in range(num_requests):
        start = time.perf_counter()
        ask(number).raise_for_status()
        times.append(1000 * (time.perf_counter() - start))
    return sorted(times)


def wait_until_ready(client: httpx.Client) -> None:
    """Return when it answers."""
    end = time.monotonic() + READY_SECONDS
    while True:
        try:
            client.get("/healthz").raise_for_status()
        except httpx.TransportError:
            if time.monotonic() > end:
                raise
            time.sleep(0.1)
        else:
            return


def measure(client: httpx.Client, num_requests: int) -> dict[str, list[float]]:
    """Times by what is asked for."""
    wait_until_ready(client)
    ids: list[str] = []

    def create(_number: int) -> httpx.Response:
        answer = client.post("/v1/runs", json=CONFIG)
        ids.append(answer.json()["id"])
        return answer

    create(0)  # what is imported on first use is not what each request costs
    return {
        "POST /v1/runs": milliseconds(create, num_requests),
        "GET /v1/runs/ID": milliseconds(lambda number: client.get(f"/v1/runs/{ids[number]}"), num_requests),
        f"GET /v1/runs, of {num_requests + 1}": milliseconds(lambda _: client.get("/v1/runs"), 10),
        "POST /v1/runs/ID/cancel": milliseconds(lambda n: client.post(f"/v1/runs/{ids[n]}/cancel"), num_requests),
        "GET /v1/datasets": milliseconds(lambda _: client.get("/v1/datasets"), num_requests),
    }


def main() -> None:
    """Measure, print, and keep the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=200)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as listener:
        home = Path(folder)
        prepare("builtin:pydoc", home / "datasets", "docs", tokenizer="bytes")
        listener.set_inheritable(True)
        command = [sys.executable, "-m", "smelt.api.server", "--fd", str(listener.fileno())]
        environment = {**os.environ, "SMELT_HOME": folder}
        server = subprocess.Popen(command, env=environment, pass_fds=[listener.fileno()], stderr=subprocess.DEVNULL)
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=60) as client:
                times = measure(client, arguments.requests)
        finally:
            server.kill()
            server.wait()
    table = ["| request | median ms | 95% | slowest |", "|---|---:|---:|---:|"]
    for name, sorted_times in times.items():
        p95 = sorted_times[int(len(sorted_times) * 0.95)]
        table.append(f"| `{name}` | {statistics.median(sorted_times):.1f} | {p95:.1f} | {sorted_times[-1]:.1f} |")
    load = f"- load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    write_result("runs", "Runs asked of a server", table, [*describe_machine(["fastapi", "sqlalchemy"]), load])


if __name__ == "__main__":
    main()
