"""`kill -9` of each process of a server at random moments under load: what is lost, done twice or left over.

python benchmarks/kills.py [--times 25] [--seed 0]. The load: live streams, answers promised in the background, and
training runs, all on one tiny model. A kill comes 0.2 to 3 s after the server was last seen ready; "ready" means that
it answers with the model again, or that the new launcher has dialled in. All is checked again at the end.
"""

import argparse
import json
import os
import random
import signal
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import torch
from machine import describe_machine, write_result

from smelt.configs import DecoderConfig
from smelt.data.characters import ByteTokenizer
from smelt.library import prepare_data
from smelt.models.decoder import Decoder
from smelt.models.weights import write_model

CONFIG = DecoderConfig(vocab_size=256, block_size=64, n_layer=2, n_head=2, n_embd=32)
RUN = {"n_layer": 1, "n_head": 1, "n_embd": 16, "block_size": 16, "batch_size": 2, "max_iters": 200, "threads": 1}
RUN |= {"dataset": "text", "eval_interval": 50, "eval_iters": 1, "log_interval": 1, "compile": "false"}
# role -> what its command has and no other's.
ROLES = {"api": "smelt.api.server", "worker": " smelt worker ", "launcher": "smelt.cluster.launcher"}
TARGETS = (*ROLES, "supervisor")
# "lost" and "interrupted" may be seen for a moment, before the next launcher has the run.
UNDER_WAY = ("queued", "running", "lost", "interrupted")
NUM_STREAMS = 4
NUM_PROMISERS = 2
NUM_TRAINERS = 2
ORPHAN_SECONDS = 5.0  # until whoever still lives counts as an orphan: a forkserver may be importing torch
PATIENCE_SECONDS = 180.0
NOTHING = "no answer yet"


class Server:
    """`smelt serve`, started again whenever its supervisor was killed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = folder / "log"
        self.model = folder / "tiny"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.pids: set[int] = set()
        self.start()

    def start(self) -> None:
        """Start it, without waiting."""
        command = [sys.executable, "-m", "smelt", "serve", str(self.model), "--port", str(self.port)]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, process_group=0)

    def pid_of(self, role: str) -> int | None:
        """The process with that role, if there is one."""
        if role == "supervisor":
            return self.process.pid
        found = (pid for pid in children_of(self.process.pid) if ROLES[role] in f"{command_of(pid)} ")
        return next(found, None)

    def is_ready(self, role: str, old_pid: int) -> bool:
        """Whether what was killed is back, and does its work."""
        pid = self.pid_of(role)
        if pid is None or pid == old_pid:
            return False
        if role == "launcher":
            return f":{pid}' of epoch" in self.log.read_text(errors="replace")
        return self.answers()

    def answers(self) -> bool:
        """Whether it answers with the model."""
        try:
            body = {"model": "tiny", "prompt": "Once", "max_tokens": 1}
            return httpx.post(f"{self.url}/v1/completions", json=body, timeout=15).status_code == 200
        except httpx.TransportError:
            return False


class Load:
    """What clients ask while processes die, and what they were told."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.streams: Counter[str] = Counter()
        self.promised: dict[str, str] = {}  # id -> prompt
        self.runs: list[str] = []
        self.first_answers: dict[str, str] = {}
        self.stop = threading.Event()
        work = [self.stream] * NUM_STREAMS + [self.promise] * NUM_PROMISERS + [self.train] * NUM_TRAINERS
        self.threads = [threading.Thread(target=self.repeat, args=(one, number)) for number, one in enumerate(work)]
        for thread in self.threads:
            thread.start()

    def repeat(self, work: Callable[[str], None], number: int) -> None:
        """Do it again and again; who is refused or cut off tries again a little later."""
        count = 0
        while not self.stop.is_set():
            count += 1
            try:
                work(f"client {number}, request {count}")
            except (httpx.TransportError, httpx.HTTPStatusError):
                self.stop.wait(0.2)

    def stream(self, prompt: str) -> None:
        """One live answer, and how it ended."""
        body = {"model": "tiny", "prompt": prompt, "max_tokens": 400, "stream": True}
        try:
            with httpx.stream("POST", f"{self.server.url}/v1/completions", json=body, timeout=60) as answer:
                answer.raise_for_status()
                text = "".join(answer.iter_text())
        except httpx.HTTPStatusError as refusal:
            self.streams[f"refused with {refusal.response.status_code}"] += 1
            raise
        except httpx.TransportError:
            self.streams["connection broken"] += 1
            raise
        ended = text.rstrip().endswith("data: [DONE]")
        self.streams["whole" if ended else "ended with an error" if '"error"' in text else "SILENTLY CUT"] += 1

    def promise(self, prompt: str) -> None:
        """One answer in the background; it counts as accepted when the server has said so."""
        body = {"model": "tiny", "prompt": prompt, "max_tokens": 30, "background": True}
        answer = httpx.post(f"{self.server.url}/v1/completions", json=body, timeout=60).raise_for_status().json()
        self.promised[answer["id"]] = prompt
        if random.random() < 0.2:
            text = self.fetched(answer["id"])
            if not text.startswith(NOTHING):
                self.first_answers[answer["id"]] = text
        self.stop.wait(0.05)

    def train(self, _: str) -> None:
        """One run, and then wait for its end."""
        answer = httpx.post(f"{self.server.url}/v1/runs", json=RUN, timeout=60).raise_for_status().json()
        run_id = answer["id"]
        self.runs.append(run_id)
        while not self.stop.is_set() and self.state_of(run_id) in UNDER_WAY:
            self.stop.wait(0.5)

    def fetched(self, name: str) -> str:
        """The text of an answer, once it is there; what else there is to say otherwise."""
        found = httpx.get(f"{self.server.url}/v1/completions/{name}", params={"wait": 30}, timeout=60)
        body = found.json()
        return str(body["choices"][0]["text"]) if body.get("status") == "completed" else f"{NOTHING}: {body}"

    def state_of(self, run_id: str) -> str:
        """How a run stands; "?" while nobody can say."""
        try:
            found = httpx.get(f"{self.server.url}/v1/runs/{run_id}", timeout=30).raise_for_status().json()
            return str(found["state"])
        except (httpx.TransportError, httpx.HTTPStatusError):
            return "queued"

    def end(self) -> None:
        """Ask nothing new."""
        self.stop.set()
        for thread in self.threads:
            thread.join()


def command_of(pid: int) -> str:
    """A process's command; nothing for one that is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def parents() -> dict[int, int]:
    """pid -> parent of every living process."""
    found = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            state, parent = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()[:2]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if state not in "ZX":
            found[int(name)] = int(parent)
    return found


def children_of(pid: int) -> list[int]:
    """Its living children."""
    return [child for child, parent in parents().items() if parent == pid]


def below(pid: int) -> set[int]:
    """Its living descendants."""
    known = parents()
    found: set[int] = set()
    wanted = {pid}
    while wanted:
        wanted = {child for child, parent in known.items() if parent in wanted}
        found |= wanted
    return found


def eventually(look: Callable[[], bool], what: str) -> None:
    """Return when it is true."""
    until = time.monotonic() + PATIENCE_SECONDS
    while not look():
        if time.monotonic() > until:
            raise TimeoutError(f"{what} did not come within {PATIENCE_SECONDS:g} s")
        time.sleep(0.02)


def kill(server: Server, role: str) -> tuple[float, int]:
    """Kill a process: seconds until its work is done again, and how many of its own it left behind."""
    eventually(lambda: server.pid_of(role) is not None, f"the {role}")
    pid = server.pid_of(role)
    assert pid is not None
    doomed = below(pid) | {pid}
    began = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    if role == "supervisor":
        server.process.wait()
        server.start()
    eventually(lambda: server.is_ready(role, pid), f"the next {role}")
    seconds = time.monotonic() - began
    while doomed & parents().keys() and time.monotonic() - began < ORPHAN_SECONDS:
        time.sleep(0.02)
    left = doomed & parents().keys()
    for orphan in left:
        sys.stderr.write(f"orphan of the {role}: {orphan} {command_of(orphan)}\n")
    return seconds, len(left)


def kill_everybody(server: Server, times: int, seed: int) -> tuple[dict[str, list[float]], int]:
    """(role -> seconds until ready of each kill, number of orphans)."""
    dice = random.Random(seed)
    order = list(TARGETS) * times
    dice.shuffle(order)
    seconds: dict[str, list[float]] = {role: [] for role in TARGETS}
    num_orphans = 0
    for role in order:
        time.sleep(dice.uniform(0.2, 3.0))
        taken, left = kill(server, role)
        seconds[role].append(taken)
        num_orphans += left
        eventually(server.answers, "an answer")
        sys.stderr.write(f"{role}: ready after {taken:.1f} s\n")
    return seconds, num_orphans


def account(load: Load, folder: Path) -> list[str]:
    """Rows of the table: what became of everything that was accepted."""
    answers = {name: load.fetched(name) for name in load.promised}
    lost = [name for name, text in answers.items() if text.startswith(NOTHING)]
    for name in lost:
        sys.stderr.write(f"lost: {name}: {answers[name]}\n")
    changed = [name for name, text in load.first_answers.items() if answers[name] != text]
    for name in changed:
        sys.stderr.write(f"changed: {name}: {load.first_answers[name]!r} became {answers[name]!r}\n")
    eventually(lambda: all(load.state_of(run) not in UNDER_WAY for run in load.runs), "the last runs")
    states = {run: load.state_of(run) for run in load.runs}
    lost_runs = [run for run, state in states.items() if state != "finished"]
    for run in lost_runs:
        sys.stderr.write(f"lost: {run}: {states[run]}\n")
    twice = [run for run in load.runs if steps_of(folder / "runs" / run) != list(range(1, RUN["max_iters"] + 1))]
    rows = answered_rows(folder / "smelt.db")
    repeated = [prompt for prompt, count in Counter(rows).items() if count > 1]
    sys.stderr.write("".join(f"there twice: {prompt!r}\n" for prompt in repeated))
    return [
        f"| answers in the background | {len(answers)} | {len(lost)} | {len(repeated) + len(changed)} |",
        f"| runs | {len(load.runs)} | {len(lost_runs)} | {len(twice)} |",
    ]


def steps_of(out_dir: Path) -> list[int]:
    """Of which steps a run has metrics, in their order."""
    metrics = out_dir / "metrics.jsonl"
    lines: list[dict[str, Any]] = [json.loads(line) for line in metrics.read_text().splitlines()]
    return [line["step"] for line in lines if line["kind"] == "step"]


def answered_rows(database: Path) -> list[bytes]:
    """The requests of all answers that were accepted, each of which was sent once."""
    with sqlite3.connect(database) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        rows = connection.execute("SELECT request FROM futures WHERE kind = 'generate'").fetchall()
    return [request[request.index(b"client ") :].split(b"\xa6")[0] for (request,) in rows]


def prepare(folder: Path) -> None:
    """A model to serve and a dataset to train on, in a home folder."""
    os.environ |= {"SMELT_HOME": str(folder), "SMELT_DEVICE": "cpu", "SMELT_THREADS": "1", "OMP_NUM_THREADS": "1"}
    torch.manual_seed(0)
    decoder = Decoder(CONFIG)
    decoder.initialize(0)
    write_model(CONFIG, decoder.state_dict(), folder / "tiny")
    ByteTokenizer().save(folder / "tiny")
    (folder / "text").write_text("Once upon a time there was a small model that learned to write.\n" * 300)
    prepare_data(str(folder / "text"), "text", tokenizer="bytes", block_size=16)


def measure(times: int, seed: int) -> list[str]:
    """The table's lines."""
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:
        folder = Path(name)
        prepare(folder)
        server = Server(folder)
        try:
            eventually(server.answers, "the first answer")
            load = Load(server)
            try:
                seconds, num_orphans = kill_everybody(server, times, seed)
            finally:
                load.end()
            accounts = account(load, folder)
            everybody = below(server.process.pid)
            server.process.terminate()
            code = server.process.wait(60)
            num_orphans += len(everybody & parents().keys())
        finally:
            server.process.kill()
    lines = ["| killed | times | ready p50 s | p95 s | max s |", "|---|---|---|---|---|"]
    lines += [row(role, taken) for role, taken in seconds.items()]
    lines += ["", "| accepted | number | lost | done twice |", "|---|---|---|---|", *accounts, ""]
    ends = ", ".join(f"{count} {how}" for how, count in load.streams.most_common())
    return [*lines, f"Orphans: {num_orphans}. Exit code at the end: {code}. Live streams: {ends}."]


def row(role: str, taken: list[float]) -> str:
    """A line of the first table."""
    p95 = statistics.quantiles(taken, n=20)[18] if len(taken) > 1 else taken[0]
    return f"| {role} | {len(taken)} | {statistics.median(taken):.1f} | {p95:.1f} | {max(taken):.1f} |"


def main() -> None:
    """Kill, count, print and keep the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=25, help="kills of each process")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    table = measure(arguments.times, arguments.seed)
    load = f"- load average at the end: {os.getloadavg()[0]:.1f}; niceness {os.nice(0)}"
    write_result("kills", "Killing everybody", table, [*describe_machine(["uvicorn", "sqlalchemy", "torch"]), load])


if __name__ == "__main__":
    main()
