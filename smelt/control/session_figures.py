"""What models in training by request have come to, step by step: noted as results are kept, read as they grow.

sessions/LANE/figures.jsonl has a line for each loss, sample and step of the optimizer, and for what clients tell of
themselves, such as rewards; beyond some size the older half is thinned. Nobody waits for a line, so a crash may cost
the last ones: what is trained is in the ledger. Computes nothing and knows no HTTP.
"""

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from smelt.control.run_metrics import LineFile
from smelt.control.saved_weights import folder_of
from smelt.models.aliases import write_whole
from smelt.storage.futures import Granted
from smelt.transport.messages import Result
from smelt.transport.operations import SAMPLE, OptimStep, Sample
from smelt.transport.tinker_wire import loss_told, samples_told

FIGURES_FILE = "figures.jsonl"
MAX_BYTES = 4 * 2**20
MAX_READERS = 256  # files of which it is known what was read
MAX_PAUSE_S = 60.0  # between two steps; after a longer one the pace begins anew
NOTED = ("forward_backward", "optim_step", SAMPLE)

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Step:
    """One step of the optimizer. `loss` is per unit of weight: per token where all weights are 1."""

    step: int
    time: float  # seconds since 1970
    loss: float | None = None
    grad_norm: float | None = None
    learning_rate: float | None = None
    num_tokens: int = 0
    tokens_per_second: float | None = None
    num_samples: int = 0  # drawn since the step before
    tokens_per_sample: float | None = None
    sample_logprob: float | None = None  # the mean of a sampled token
    told: dict[str, float] = field(default_factory=dict)  # by the client, such as the reward


class Line(msgspec.Struct, omit_defaults=True):
    """One line of the file; the fields of the other kinds keep their defaults. A `step` may stand for older ones."""

    kind: str  # loss, optim, sample, told or step
    time: float = 0.0
    seq: int = 0
    loss: float = 0.0
    weight: float = 0.0
    num_tokens: int = 0
    num_samples: int = 0
    logprob: float = 0.0  # the sum over the tokens of the samples
    grad_norm: float | None = None
    learning_rate: float | None = None
    told: dict[str, float] = {}
    step: Step | None = None


LINE = msgspec.json.Decoder(Line)


def figures_file(home: Path, model_id: str) -> Path:
    """Where the figures of a model lie."""
    return home / folder_of(model_id, FIGURES_FILE)


class Progress:
    """The steps of one model, read as its file grows."""

    def __init__(self, path: Path) -> None:
        self._file = LineFile(path)
        self.steps: list[Step] = []
        self.num_readings = 1  # from the start
        self.open: list[Line] = []  # since the last step
        self._last_seq = -1

    def read(self) -> None:
        """Take in what was added."""
        lines = self._file.read()
        if lines is None:  # thinned meanwhile
            self.steps, self.open, self._last_seq = [], [], -1
            self.num_readings += 1
            lines = self._file.read() or []
        for line in lines:
            try:
                self._take(LINE.decode(line))
            except msgspec.DecodeError:  # half a line that a full disk has left
                continue

    def _take(self, line: Line) -> None:
        if line.step is not None:
            self.steps.append(line.step)
        elif line.kind == "optim":
            if line.seq > self._last_seq:  # never twice, whatever was noted
                self._last_seq = line.seq
                self._close(line)
        else:
            self.open.append(line)

    def _close(self, optim: Line) -> None:
        before = self.steps[-1] if self.steps else None
        losses = [line for line in self.open if line.kind == "loss"]
        samples = [line for line in self.open if line.kind == "sample"]
        weight = sum(line.weight for line in losses)
        num_tokens, num_sampled = (sum(line.num_tokens for line in lines) for lines in (losses, samples))
        num_samples = sum(line.num_samples for line in samples)
        pause = None if before is None else optim.time - before.time
        self.steps.append(
            Step(
                1 if before is None else before.step + 1,
                optim.time,
                sum(line.loss for line in losses) / weight if weight else None,
                optim.grad_norm,
                optim.learning_rate,
                num_tokens,
                num_tokens / pause if pause and pause < MAX_PAUSE_S else None,
                num_samples,
                num_sampled / num_samples if num_samples else None,
                sum(line.logprob for line in samples) / num_sampled if num_sampled else None,
                {name: value for line in self.open for name, value in line.told.items()},
            )
        )
        self.open.clear()


class SessionFigures:
    """Of all models below a home folder. `note` and `tell` write, line after line, on a thread of their own."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._writer = ThreadPoolExecutor(1, "session-figures")
        self._read: OrderedDict[str, Progress] = OrderedDict()
        self._reading = threading.Lock()

    def note(self, row: Granted, result: Result) -> None:
        """Take down what has become of an operation; nobody waits for it."""
        if row.kind in NOTED and result.failure is None and row.request is not None:
            self._writer.submit(self._write, row, result.body).add_done_callback(_complain)

    def tell(self, model_id: str, values: Mapping[str, float]) -> "Future[None]":
        """Take down what a client says of the step that it is about to take."""
        return self._writer.submit(self._add, model_id, Line("told", time.time(), told=dict(values)))

    def steps(self, model_id: str) -> tuple[list[Step], int]:
        """The steps so far, and how often they were read from the start: then those from before are void."""
        with self._reading:
            progress = self._read.get(model_id)
            if progress is None:
                progress = self._read[model_id] = Progress(figures_file(self._home, model_id))
                if len(self._read) > MAX_READERS:
                    self._read.popitem(last=False)
            self._read.move_to_end(model_id)
            progress.read()
            return list(progress.steps), progress.num_readings

    def close(self) -> None:
        """Return when all that was noted is written."""
        self._writer.shutdown()

    def _write(self, row: Granted, body: bytes) -> None:
        assert row.request is not None, "it was looked at"
        if row.kind == SAMPLE:
            lane = msgspec.msgpack.decode(row.request, type=Sample).sampler.lane
            num_samples, num_tokens, logprob = samples_told(body)
            line: Line | None = Line(
                "sample", time.time(), num_tokens=num_tokens, num_samples=num_samples, logprob=logprob
            )
        else:
            lane = row.lane
            line = _optim(row, body) if row.kind == "optim_step" else _loss(row.request, body)
        if lane is not None and line is not None:
            self._add(lane, line)

    def _add(self, model_id: str, line: Line) -> None:
        path = figures_file(self._home, model_id)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            file.write(msgspec.json.encode(line) + b"\n")
            is_full = file.tell() > MAX_BYTES
        if is_full:
            _thin(path)


def _loss(request: bytes, body: bytes) -> Line | None:
    told = loss_told(request, body)
    if told is None:
        return None
    loss, weight, num_tokens = told
    return Line("loss", time.time(), loss=loss, weight=weight, num_tokens=num_tokens)


def _optim(row: Granted, body: bytes) -> Line:
    assert row.seq is not None, "a session has an order"
    assert row.request is not None, "it was looked at"
    metrics = msgspec.json.decode(body).get("metrics") or {}
    rate = msgspec.msgpack.decode(row.request, type=OptimStep).learning_rate
    return Line("optim", time.time(), row.seq, grad_norm=metrics.get("grad_norm"), learning_rate=rate)


def _thin(path: Path) -> None:
    """Keep every second step of the older half, and all of the newer."""
    progress = Progress(path)
    progress.read()
    half = len(progress.steps) // 2
    kept = [Line("step", step=step) for step in (*progress.steps[:half:2], *progress.steps[half:])]
    write_whole(path, "".join(msgspec.json.encode(line).decode() + "\n" for line in (*kept, *progress.open)))


def _complain(writing: "Future[None]") -> None:
    if (error := writing.exception()) is not None:
        log.error("cannot note a figure of a session: %s", error)
