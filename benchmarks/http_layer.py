"""What HTTP costs around a model: requests per second against a bare FastAPI route, and hundreds of streams at once.

The model is a fake, so that nothing else is measured. The servers run on one core, whoever asks on another. Requests
are POSTs of `wrk`, with the whole gate in front of ours; rounds against the two servers alternate.

    python benchmarks/http_layer.py [--seconds 3] [--rounds 5] [--only requests|streams]
"""

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from urllib.request import urlopen

import uvicorn
import uvloop
from fastapi import FastAPI
from machine import describe_machine, write_result
from pydantic import BaseModel
from starlette.types import ASGIApp

from smelt.api.app import create_app
from smelt.api.services import Services
from smelt.api.telemetry import configure_logging
from smelt.control.abuse_checker import AbuseChecker
from smelt.control.model_server import WorkerInfo
from smelt.settings import Settings
from smelt.storage.database import open_database
from smelt.storage.files import Files
from smelt.storage.futures import Ledger
from smelt.storage.writer import Writer
from smelt.transport.messages import Embed, Embedded, Finish, Generate, TextChunk

PATH = "/v1/completions"
NUM_CONNECTIONS = 32
NUM_STREAMS = 500
RATES = (10, 15, 20)  # tokens per second of each stream
WORD = b" word"
PROMPT = "The quick brown fox jumps over the lazy dog. " * 4
BODY = {"model": "tiny", "prompt": PROMPT, "max_tokens": 1, "temperature": 0.7}
CONFIG = {"model_type": "gpt2", "vocab_size": 257, "n_positions": 64, "n_layer": 1, "n_head": 1, "n_embd": 8}
REPORT = """
function done(summary, latency, requests)
  io.write(string.format("%d %f %f %f %d\\n", summary.requests, summary.duration / 1e6,
    latency:percentile(50) / 1e3, latency:percentile(99) / 1e3,
    summary.errors.status + summary.errors.connect + summary.errors.read + summary.errors.timeout))
end
"""


class Typist:
    """Implements ModelServer: `rate` tokens in a second. Those that are late come together, as a worker's would."""

    workers: list[WorkerInfo] = []

    def __init__(self, rate: float) -> None:
        self._rate = rate

    async def generate(self, request: Generate) -> AsyncGenerator[TextChunk | Finish, None]:
        """As many tokens as were asked for, the first at once."""
        clock, num_tokens, num_written = asyncio.get_running_loop().time, request.params.max_tokens, 0
        began = clock()
        while True:
            num_due = min(num_tokens, 1 + int(self._rate * (clock() - began))) - num_written
            if num_due:
                yield TextChunk(request.request_id, WORD.decode() * num_due, tuple(range(num_due)))
            num_written += num_due
            if num_written == num_tokens:
                break
            await asyncio.sleep(began + num_written / self._rate - clock())
        yield Finish(request.request_id, "length", 40, num_tokens)

    async def embed(self, request: Embed) -> tuple[Embedded, Finish]:
        """Nobody asks for vectors here."""
        raise NotImplementedError

    async def load_model(self, model: str) -> None:
        """Nor for models."""
        raise NotImplementedError

    async def unload_model(self, model: str) -> int:
        """Nor to be rid of them."""
        raise NotImplementedError

    async def cancel(self, owner: str, future_id: str) -> bool:
        """Nothing is asked of the ledger here."""
        raise NotImplementedError


class Asked(BaseModel):
    """The body of the bare route."""

    model: str
    prompt: str
    max_tokens: int = 16
    temperature: float = 1.0


class Choice(BaseModel):
    """Part of its answer."""

    index: int
    text: str
    finish_reason: str
    logprobs: None = None


class Answer(BaseModel):
    """As long as ours."""

    id: str
    created: int
    model: str
    choices: list[Choice]
    usage: dict[str, int]
    object: str = "text_completion"
    system_fingerprint: str = "smelt-0.0.0"


def bare() -> ASGIApp:
    """FastAPI with one route, as its tutorial has it."""
    app = FastAPI()

    @app.post(PATH)
    async def complete(asked: Asked) -> Answer:
        choice = Choice(index=0, text=" word", finish_reason="length")
        usage = {"prompt_tokens": 40, "completion_tokens": 1, "total_tokens": 41}
        return Answer(id="cmpl-" + "0" * 32, created=1, model=asked.model, choices=[choice], usage=usage)

    return app


@contextmanager
def whole(home: Path, rate: float) -> Iterator[ASGIApp]:
    """The application as it is served, with a fake in the worker's place."""
    folder = home / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    settings = Settings(home=home)
    engine = open_database(settings.database_url)
    writer = Writer(engine)
    ledger = Ledger(engine, writer, Files(settings.bodies))
    checker = AbuseChecker(settings, engine, writer)
    yield create_app(Services(settings, engine, writer, ledger, Typist(rate), checker, str(folder)))
    writer.close()
    engine.dispose()


def serve(which: str, port: int, rate: float) -> None:
    """Be a server, on the first core."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    options = {"http": "httptools", "ws": "none", "log_config": None, "access_log": False, "server_header": False}
    if which == "bare":
        uvicorn.run(bare(), port=port, **options)
        return
    with tempfile.TemporaryDirectory() as home, Path(home, "log").open("w") as log:
        configure_logging(log)
        with whole(Path(home), rate) as app:
            uvicorn.run(app, port=port, **options)


@dataclass(frozen=True, slots=True)
class Process:
    """A server in a process of its own."""

    pid: int
    port: int

    @property
    def address(self) -> str:
        """Where it is."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def cpu_seconds(self) -> float:
        """What it has computed so far: the one measure that others on the machine do not change much."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def server(which: str, rate: float = 1.0) -> Iterator[Process]:
    """A server, while the block runs."""
    port = {"bare": 8731, "smelt": 8732}[which]
    command = [sys.executable, __file__, "--serve", which, "--port", str(port), "--rate", str(rate)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    started = Process(process.pid, port)
    try:
        until = time.monotonic() + 60
        while not answers(f"{started.address}/openapi.json"):
            assert process.poll() is None, "the server has died"
            assert time.monotonic() < until, "the server does not come up"
            time.sleep(0.1)
        yield started
    finally:
        process.terminate()
        process.wait()


def answers(url: str) -> bool:
    """Whether somebody is there."""
    try:
        with urlopen(url) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def load(target: Process, script: Path, seconds: int) -> list[float]:
    """(requests per second, p50 and p99 in ms, CPU µs per request) of one round of wrk on the last core."""
    core = str(max(os.sched_getaffinity(0)))
    command = ["taskset", "-c", core, "wrk", "-t1", f"-c{NUM_CONNECTIONS}", f"-d{seconds}s", "-s", str(script)]
    used_before = target.cpu_seconds
    done = subprocess.run([*command, target.address + PATH], capture_output=True, text=True, check=True)
    num_requests, duration, p50, p99, num_failed = map(float, done.stdout.strip().splitlines()[-1].split())
    assert num_failed == 0, done.stdout
    return [num_requests / duration, p50, p99, 1e6 * (target.cpu_seconds - used_before) / num_requests]


def compare(seconds: int, num_rounds: int) -> list[str]:
    """The table of requests per second: medians of the rounds."""
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as file, server("bare") as theirs, server("smelt") as ours:
        body = json.dumps(BODY)
        file.write(f'wrk.method = "POST"\nwrk.body = [==[{body}]==]\n')
        file.write(f'wrk.headers["Content-Type"] = "application/json"\n{REPORT}')
        file.flush()
        script = Path(file.name)
        rounds: dict[Process, list[list[float]]] = {theirs: [], ours: []}
        for target in rounds:
            load(target, script, 1)
        for _ in range(num_rounds):
            for target, measured in rounds.items():
                measured.append(load(target, script, seconds))
    shares = [mine[0] / bare[0] for mine, bare in zip(rounds[ours], rounds[theirs], strict=True)]
    lines = [f"POST {PATH}, 1 token, {NUM_CONNECTIONS} connections:", ""]
    lines += ["| | requests/s | p50 ms | p99 ms | CPU µs each |", "|---|---|---|---|---|"]
    cpu: dict[Process, float] = {}
    for name, target in (("a bare FastAPI route", theirs), ("smelt, whole, with a fake model", ours)):
        rate, p50, p99, cpu[target] = (statistics.median(column) for column in zip(*rounds[target], strict=True))
        lines.append(f"| {name} | {rate:,.0f} | {p50:.1f} | {p99:.1f} | {cpu[target]:.0f} |")
    spread = f"{min(shares):.2f} to {max(shares):.2f} in {num_rounds} rounds"
    return [*lines, f"| ratio | {statistics.median(shares):.2f} ({spread}) | | | {cpu[theirs] / cpu[ours]:.2f} |", ""]


class Listener(asyncio.Protocol):
    """Asks for one stream, and notes when its tokens come: in few steps, or we would measure ourselves."""

    def __init__(self, port: int, num_tokens: int) -> None:
        body = json.dumps({**BODY, "max_tokens": num_tokens, "stream": True})
        head = f"POST {PATH} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
        self._request = f"{head}Connection: close\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()
        self._seen = b""
        self._num_missing = num_tokens
        self.began = time.perf_counter()
        self.times: list[float] = []
        self.ended = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Ask."""
        transport.write(self._request)  # type: ignore[attr-defined]  # uvloop's has no class of asyncio's

    def data_received(self, data: bytes) -> None:
        """Count the words; one may lie across two of these."""
        self._seen = self._seen[1 - len(WORD) :] + data
        if num_words := self._seen.count(WORD):
            self.times.append(time.perf_counter())
            self._num_missing -= num_words

    def connection_lost(self, _: Exception | None) -> None:
        """Whether it was all there."""
        self.ended.set_result(self._num_missing == 0 and self._seen.endswith(b"0\r\n\r\n"))


async def read_streams(port: int, rate: float, seconds: float) -> str:
    """The cells of the table of streams, which all begin at once."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    loop, listeners = asyncio.get_running_loop(), []
    for _ in range(NUM_STREAMS):
        _, listener = await loop.create_connection(lambda: Listener(port, int(rate * seconds)), "127.0.0.1", port)
        listeners.append(listener)
    num_whole = sum(await asyncio.gather(*[listener.ended for listener in listeners]))
    firsts = sorted(listener.times[0] - listener.began for listener in listeners)
    gaps = sorted(late - early for each in listeners for early, late in pairwise(each.times))
    cells = [at(gaps, 0.5), at(gaps, 0.99), at(gaps, 1), at(firsts, 0.5), at(firsts, 0.99)]
    return " | ".join([*[f"{1e3 * seconds:.0f}" for seconds in cells], str(num_whole)])


def at(ordered: list[float], share: float) -> float:
    """The quantile of numbers in order."""
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def stream(seconds: float) -> list[str]:
    """The table of streams."""
    gaps, firsts = ("gap p50 ms", "gap p99 ms", "longest gap ms"), ("first p50 ms", "first p99 ms")
    names = ("tokens/s each", "tokens/s", "CPU µs per token", *gaps, *firsts, "whole")
    lines = [f"{NUM_STREAMS} streams that begin at once:", "", f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for rate in RATES:
        with server("smelt", rate) as target:
            ask = [sys.executable, __file__, "--read", str(target.port), "--rate", str(rate), "--seconds", str(seconds)]
            used_before = target.cpu_seconds
            cells = subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()
            cpu_us = 1e6 * (target.cpu_seconds - used_before) / (NUM_STREAMS * int(rate * seconds))
            lines.append(f"| {rate:g} | {rate * NUM_STREAMS:,.0f} | {cpu_us:.0f} | {cells} |")
    return [*lines, ""]


def main() -> None:
    """Measure, print and keep the tables; or be one of the processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=3, help="of each round of requests; streams have twice that")
    parser.add_argument("--rounds", type=int, default=5, help="against each of the two servers")
    parser.add_argument("--only", choices=["requests", "streams"], help="keep no table, print one")
    parser.add_argument("--serve", choices=["bare", "smelt"], help=argparse.SUPPRESS)
    parser.add_argument("--read", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--rate", type=float, default=1.0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve, arguments.port, arguments.rate)
    elif arguments.read:
        print(uvloop.run(read_streams(arguments.read, arguments.rate, arguments.seconds)))
    else:
        table: list[str] = []
        if arguments.only != "streams":
            table += compare(arguments.seconds, arguments.rounds)
        if arguments.only != "requests":
            table += stream(2 * arguments.seconds)
        if arguments.only:
            print("\n".join(table))
        else:
            packages = ["fastapi", "starlette", "uvicorn", "uvloop", "pydantic", "msgspec"]
            load_now = f"- load average at the end: {os.getloadavg()[0]:.1f}; niceness {os.nice(0)}"
            write_result("http", "HTTP around a fake model", table, [*describe_machine(packages), load_now])


if __name__ == "__main__":
    main()
