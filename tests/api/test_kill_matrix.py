"""`kill -9` at every named point of an operation's life, in the API and in the worker, while Tinker's client trains.

Whatever dies: the client's futures all answer, each operation is done once, and what comes of it is what comes of it
undisturbed, bit for bit. `make chaos` runs all points; a few of them are among the slow tests.
"""

import hashlib
import os
import random
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest
import tinker
import torch
from sqlalchemy import select
from tinker import types

from leftovers import collected
from processes import needs_proc
from serving import Server, environment, serving, write_tiny_model
from session_worker import CONFIG
from smelt.storage.database import open_database, sqlite_url
from smelt.storage.faults import LEDGER_POINTS, LOG_POINTS, POINTS, SESSION_POINTS
from smelt.storage.tables import futures
from smelt.transport.addresses import socket_path
from smelt.transport.operations import SAMPLE, Sample

SCRIPT = Path(__file__).parents[1] / "session_worker.py"
NUM_STEPS = 8
MAX_REPLAY_STEPS = 2  # so that there are snapshots
PROMPT = types.ModelInput.from_ints(list(b"To be"))
DRAWN = types.SamplingParams(max_tokens=6, temperature=1.0)
DEADLINE = 120.0

# For which time at a point, where it is not the one that stands here.
NTH = {"mid_file_write": 1, "between_rename_and_fsync": 1, "before_operation": 12, "after_operation": 12}
NTH |= {"mid_snapshot": 2, "after_snapshot": 2, "before_old_snapshots_go": 2, "after_log_forgotten": 2}
CASES = {f"{point}:{NTH.get(point, 6)}": point for point in POINTS} | {"after_operation:1": "after_operation"}
IN_LARGE_BODIES = ("mid_file_write", "between_rename_and_fsync")
FEW = ("after_commit_before_answer", "after_operation", "mid_snapshot")

pytestmark = [
    needs_proc,
    pytest.mark.timeout(400),
    # Its client keeps sessions of its own open until the process ends.
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def case(spec: str) -> Any:
    is_common = CASES[spec] in FEW and not spec.endswith(":1")
    return pytest.param(spec, marks=pytest.mark.slow if is_common else pytest.mark.chaos)


@dataclass(slots=True)
class Outcome:
    """What a client has got, and what has been kept of it."""

    losses: list[list[float]] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    drawn: list[list[list[int]]] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)  # of what was drawn
    files: dict[str, str] = field(default_factory=dict)
    num_operations: Counter[str] = field(default_factory=Counter)

    def check_same(self, other: "Outcome") -> None:
        """What is trained and saved is the same, bit for bit. What is drawn has roundings of its company."""
        assert self.losses == other.losses
        assert self.norms == other.norms
        assert self.drawn == other.drawn
        assert self.logprobs == pytest.approx(other.logprobs, abs=1e-5)
        assert self.files == other.files
        assert self.num_operations == other.num_operations


class Worker:
    """A worker of sessions that is started again when it has died; the fault is the first one's alone."""

    def __init__(self, home: Path, fault: str | None) -> None:
        command = [sys.executable, str(SCRIPT), str(socket_path(home)), str(home), str(MAX_REPLAY_STEPS)]
        self._command = command + ([fault] if fault else [])
        self._environment = environment(home)
        self._is_over = threading.Event()
        self._process = self._start()
        self.num_deaths = 0
        self._thread = threading.Thread(target=self._keep)
        self._thread.start()

    def kill(self) -> None:
        self._process.kill()

    def end(self) -> None:
        self._is_over.set()
        while self._thread.is_alive():
            self._process.kill()
            self._thread.join(0.1)

    def _start(self) -> "subprocess.Popen[bytes]":
        return subprocess.Popen(self._command, env=self._environment)

    def _keep(self) -> None:
        while self._process.wait() is not None and not self._is_over.is_set():
            self.num_deaths += 1
            self._process = self._start()


@contextmanager
def running(folder: Path, fault: str | None = None) -> Iterator[tuple[Server, Worker, tinker.ServiceClient]]:
    """A server, its worker and a client; the fault is that of whoever has its point."""
    home, model = folder / "home", folder / "tiny"
    write_tiny_model(model, vocab_size=CONFIG.vocab_size)
    in_worker = fault is not None and fault.partition(":")[0] in SESSION_POINTS
    with collected(), pytest.MonkeyPatch.context() as patch:
        patch.setenv("TINKER_TELEMETRY", "0")
        if fault is not None and not in_worker:
            patch.setenv("SMELT_FAULT", fault)
        with serving(home, str(model), "--no-worker") as server:
            patch.delenv("SMELT_FAULT", raising=False)
            worker = Worker(home, fault if in_worker else None)
            try:
                with tinker.ServiceClient(base_url=server.url, api_key="tml-test") as service:
                    yield server, worker, service
            finally:
                worker.end()


def datum(seed: int, num_tokens: int = 24) -> types.Datum:
    ids = random.Random(seed).choices(range(CONFIG.vocab_size), k=num_tokens + 1)
    inputs = {"target_tokens": torch.tensor(ids[1:]), "weights": torch.ones(num_tokens)}
    return types.Datum(
        model_input=types.ModelInput.from_ints(ids[:-1]),
        loss_fn_inputs={name: types.TensorData.from_torch(value) for name, value in inputs.items()},
    )


def nothing(_step: int) -> None:
    """Disturb nobody."""


def trained(
    service: tinker.ServiceClient, home: Path, disturb: Callable[[int], None] = nothing, *, with_large: bool = False
) -> Outcome:
    """A loop with steps, saves, samplers without a name, and samples with and without a seed, all under way at once."""
    outcome = Outcome()
    training = service.create_lora_training_client("tiny", rank=4, seed=5).result(DEADLINE)
    if with_large:  # so large that it lies in a file
        training.forward([datum(seed, CONFIG.block_size - 1) for seed in range(1024)], "cross_entropy").result(DEADLINE)
    losses, norms, seeded, unseeded, saved = [], [], [], [], []
    samplers = []
    for step in range(NUM_STEPS):
        losses.append(training.forward_backward([datum(2 * step), datum(2 * step + 1)], "cross_entropy"))
        norms.append(training.optim_step(types.AdamParams(learning_rate=0.02)))
        disturb(step)
        samplers.append(training.save_weights_and_get_sampling_client().result(DEADLINE))
        seeded.append(samplers[-1].sample(PROMPT, 2, DRAWN.model_copy(update={"seed": step})))
        unseeded.append(samplers[-1].sample(PROMPT, 1, DRAWN))
        if step % 3 == 2:
            saved.append(training.save_state(f"at-{step}"))
    saved += [training.save_weights_for_sampler("final"), training.save_state("final")]
    for loss in losses:
        result = loss.result(DEADLINE)
        outcome.losses.append([result.metrics["loss:sum"], *result.loss_fn_outputs[0]["logprobs"].tolist()])
    outcome.norms = [(norm.result(DEADLINE).metrics or {})["grad_norm"] for norm in norms]
    outcome.drawn = [tokens(sample) for sample in seeded]
    outcome.logprobs = [each for sample in seeded for one in sample.result().sequences for each in one.logprobs]
    assert all(save.result(DEADLINE).path for save in saved)
    outcome.files = files_of(home)
    rows = rows_of(home)
    assert {row.state for row in rows} == {"done"}
    outcome.num_operations = Counter(row.kind for row in rows)
    again = [DRAWN.model_copy(update={"seed": seed}) for seed in drawn_seeds(rows)]
    for sampler, params, sample in zip(samplers, again, unseeded, strict=True):
        assert tokens(sampler.sample(PROMPT, 1, params)) == tokens(sample)
    return outcome


def tokens(sample: Any) -> list[list[int]]:
    return [list(sequence.tokens) for sequence in sample.result(DEADLINE).sequences]


def files_of(home: Path) -> dict[str, str]:
    """name -> sha256 of all that was saved. A sampler goes by its turn: a client that tries again counts on."""
    [session] = (home / "sessions").iterdir()
    folders = [folder for kind in ("weights", "sampler_weights") for folder in sorted((session / kind).iterdir())]
    samplers = sorted((session / "ephemeral").iterdir(), key=lambda folder: int(folder.name.rpartition("_")[2]))
    named = {f"{folder.parent.name}/{folder.name}": folder for folder in folders}
    named |= {f"sampler {turn}": folder for turn, folder in enumerate(samplers)}
    return {
        f"{name}/{path.name}": hashlib.sha256(path.read_bytes()).hexdigest()
        for name, folder in named.items()
        for path in folder.iterdir()
    }


def rows_of(home: Path) -> list[Any]:
    engine = open_database(sqlite_url(home / "smelt.db"))
    with engine.connect() as connection:
        rows = list(connection.execute(select(futures).order_by(futures.c.number)))
    engine.dispose()
    return rows


def drawn_seeds(rows: list[Any]) -> list[int]:
    """The seeds that the server drew for those who gave none, in the order in which they were accepted."""
    samples = [msgspec.msgpack.decode(row.request, type=Sample) for row in rows if row.kind == SAMPLE]
    return [sample.params.seed for sample in samples if sample.params.seed >= NUM_STEPS]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    folder = tmp_path_factory.mktemp("undisturbed")
    with running(folder) as (_, worker, service):
        outcome = trained(service, folder / "home")
        assert worker.num_deaths == 0
    assert not (folder / "home" / ".fault").exists()
    return outcome


@pytest.mark.parametrize("spec", [case(spec) for spec in CASES])
def test_whoever_dies_at_a_point_nothing_is_lost_and_nothing_done_twice(
    spec: str, undisturbed: Outcome, tmp_path: Path
) -> None:
    with_large = CASES[spec] in IN_LARGE_BODIES
    with running(tmp_path, spec) as (_, worker, service):
        outcome = trained(service, tmp_path / "home", with_large=with_large)
        assert worker.num_deaths == (CASES[spec] in SESSION_POINTS)
    assert (tmp_path / "home" / ".fault").exists(), "nobody has died"
    outcome.num_operations -= Counter(forward_backward=int(with_large))
    outcome.check_same(undisturbed)


@pytest.mark.chaos
@pytest.mark.parametrize("seed", range(4))
def test_whoever_dies_at_any_moment_nothing_is_lost(seed: int, undisturbed: Outcome, tmp_path: Path) -> None:
    """The worker, the API, or both at once."""
    rng = random.Random(seed)
    doomed = {rng.randrange(1, NUM_STEPS): roles for roles in (("worker",), ("api",), ("worker", "api"))}
    with running(tmp_path) as (server, worker, service):

        def kill(step: int) -> None:
            if "worker" in doomed.get(step, ()):
                worker.kill()
            if "api" in doomed.get(step, ()):
                os.kill(server.pid_of("api"), signal.SIGKILL)

        outcome = trained(service, tmp_path / "home", kill)
        assert worker.num_deaths > 0
    outcome.check_same(undisturbed)


def test_every_point_has_its_case() -> None:
    assert set(CASES.values()) == set(LEDGER_POINTS) | set(LOG_POINTS) | set(SESSION_POINTS)
