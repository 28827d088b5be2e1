"""A run's metrics.jsonl as others read it: while it grows, at a glance, and as curves; knows no run and no torch."""

import zlib
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from smelt.configs import RUN_METRICS

MAX_POINTS = 2000  # of a curve; more than a screen has columns
SPARK_POINTS = 60
SMOOTHING = 0.9  # weight of the past in the figures of pace
ENDINGS = ("summary", "failure", "cancelled")


class Line(msgspec.Struct, frozen=True):
    """One event of the file; the fields of the other kinds keep their defaults."""

    kind: str
    step: int = 0
    num_steps: int | None = None
    loss: float | None = None
    val_loss: float | None = None
    best_val_loss: float | None = None
    learning_rate: float | None = None
    grad_norm: float | None = None
    tokens_per_second: float | None = None
    seconds: float | None = None
    final: bool = False
    stop_reason: str = ""
    message: str = ""
    figures: dict[str, float | None] = {}  # such as the accuracy


LINE = msgspec.json.Decoder(Line)


def parsed(line: bytes) -> Line | None:
    """The event of a line; None for what no trainer writes."""
    try:
        return LINE.decode(line)
    except msgspec.DecodeError:
        return None


def note(out_dir: Path, kind: str, message: str = "") -> None:
    """Say in the run's own file what became of it while nobody trained."""
    with (out_dir / RUN_METRICS).open("ab") as file:
        file.write(msgspec.json.encode({"kind": kind, "message": message}) + b"\n")


class LineFile:
    """The whole lines of a file that grows. A file written anew is noticed, even one that has outgrown the old.

    The position is the end of the last line that was read, with a checksum of that line. `cursor` is the position as
    text, which others may keep and come back with; ValueError where it is not one.
    """

    def __init__(self, path: Path, cursor: str = "0.0.0") -> None:
        self.path = path
        self.offset, self._length, self._checksum = (int(part) for part in cursor.split("."))
        if not 0 <= self._length <= self.offset:
            raise ValueError(f"{cursor!r} is no position in a file")

    @property
    def cursor(self) -> str:
        """Where reading has come to."""
        return f"{self.offset}.{self._length}.{self._checksum}"

    def read(self, until: int | None = None) -> list[bytes] | None:
        """The lines added, up to an offset; or None, once, where the file is no longer the one that was read."""
        try:
            with self.path.open("rb") as file:
                file.seek(self.offset - self._length)
                last = file.read(self._length)
                added = file.read() if until is None else file.read(max(0, until - self.offset))
        except FileNotFoundError:
            last, added = b"", b""
        if len(last) < self._length or zlib.crc32(last) != self._checksum:
            self.offset = self._length = self._checksum = 0
            return None
        lines = added[: added.rfind(b"\n") + 1].splitlines(keepends=True)
        if lines:
            self.offset += sum(map(len, lines))
            self._length, self._checksum = len(lines[-1]), zlib.crc32(lines[-1])
        return lines


def text_of(lines: list[bytes]) -> list[str]:
    """Lines as text, without their ends."""
    return [line.decode("utf-8", errors="replace").rstrip("\r\n") for line in lines]


@dataclass
class Glance:
    """What the lines so far come to."""

    step: int = 0
    num_steps: int | None = None  # at which it will be done
    loss: float | None = None
    val_loss: float | None = None
    best_val_loss: float | None = None
    tokens_per_second: float | None = None
    step_seconds: float | None = None
    ending: Line | None = None
    waits_for: str = ""  # what it told to lack before it could begin
    spark: list[float] = field(default_factory=list)  # every so-manieth loss, evenly, at most SPARK_POINTS
    _stride: int = 1
    _num_losses: int = 0

    def add(self, line: Line) -> None:
        """Take one more event into account."""
        if line.kind in ENDINGS:
            self.ending = line
        elif line.kind in ("start", "queued", "waiting"):
            self.ending = None
        self.waits_for = line.message if line.kind == "waiting" else ""
        if line.kind == "start":
            self.num_steps = line.num_steps
        elif line.kind == "step":
            self._add_step(line)
        elif line.kind == "evaluation":
            self._add_evaluation(line)

    def _add_step(self, line: Line) -> None:
        self.ending = None
        self.step, self.loss = line.step, line.loss
        self.tokens_per_second = smoothed(self.tokens_per_second, line.tokens_per_second)
        self.step_seconds = smoothed(self.step_seconds, line.seconds)
        if line.loss is None:
            return
        if self._num_losses % self._stride == 0:
            self.spark.append(line.loss)
        self._num_losses += 1
        if len(self.spark) > SPARK_POINTS:
            self.spark = self.spark[::2]
            self._stride *= 2

    def _add_evaluation(self, line: Line) -> None:
        self.step, self.val_loss = max(self.step, line.step), line.val_loss
        if line.val_loss is not None and not line.final:
            best = self.best_val_loss
            self.best_val_loss = line.val_loss if best is None else min(best, line.val_loss)


def smoothed(before: float | None, now: float | None) -> float | None:
    """An average that forgets."""
    if before is None or now is None:
        return now if before is None else before
    return SMOOTHING * before + (1 - SMOOTHING) * now


class Glances:
    """A Glance at one file, brought up to date by reading only what was added."""

    def __init__(self, path: Path) -> None:
        self._file = LineFile(path)
        self._glance = Glance()

    def update(self) -> Glance:
        """The file at a glance, now."""
        lines = self._file.read()
        if lines is None:
            self._glance = Glance()
            lines = self._file.read() or []
        for line in map(parsed, lines):
            if line is not None:
                self._glance.add(line)
        return self._glance


@dataclass(frozen=True, slots=True)
class TrainCurve:
    """Columns of equal length, a row per logged step."""

    step: list[int]
    loss: list[float | None]
    learning_rate: list[float | None]
    grad_norm: list[float | None]
    tokens_per_second: list[float | None]
    figures: dict[str, list[float | None]]  # the recipe's own, such as the accuracy, by name


@dataclass(frozen=True, slots=True)
class ValidationCurve:
    """Columns of equal length, a row per evaluation on the way."""

    step: list[int]
    loss: list[float | None]
    figures: dict[str, list[float | None]]  # the recipe's own, such as the accuracy, by name


@dataclass(frozen=True, slots=True)
class Curves:
    """What a run's charts show. `cursor`: where they end in the file."""

    train: TrainCurve
    validation: ValidationCurve
    num_logged: int  # steps in the file; the curve has fewer where they are too many to draw
    cursor: str


def read_curves(path: Path, max_points: int = MAX_POINTS) -> Curves:
    """The curves of a file. Long ones are thinned so that every dip and peak stays."""
    file = LineFile(path)
    lines = [line for line in map(parsed, file.read() or []) if line is not None]
    steps = [line for line in lines if line.kind == "step"]
    evaluations = [line for line in lines if line.kind == "evaluation" and not line.final]
    train = [steps[index] for index in thinned([line.loss for line in steps], max_points)]
    validation = [evaluations[index] for index in thinned([line.val_loss for line in evaluations], max_points)]
    return Curves(
        TrainCurve(
            [line.step for line in train],
            [line.loss for line in train],
            [line.learning_rate for line in train],
            [line.grad_norm for line in train],
            [line.tokens_per_second for line in train],
            figures_of(train),
        ),
        ValidationCurve(
            [line.step for line in validation], [line.val_loss for line in validation], figures_of(validation)
        ),
        num_logged=len(steps),
        cursor=file.cursor,
    )


def figures_of(lines: list[Line]) -> dict[str, list[float | None]]:
    """A column for each figure that any of the lines has."""
    names = dict.fromkeys(name for line in lines for name in line.figures)
    return {name: [line.figures.get(name) for line in lines] for name in names}


def thinned(values: list[float | None], max_points: int) -> list[int]:
    """Positions of at most so many values: first, last, and the lowest and highest of each stretch between."""
    if len(values) <= max_points:
        return list(range(len(values)))
    num_stretches = (max_points - 2) // 2
    inner = len(values) - 2
    kept = {0, len(values) - 1}
    for number in range(num_stretches):
        stretch = range(1 + inner * number // num_stretches, 1 + inner * (number + 1) // num_stretches)
        known = [index for index in stretch if values[index] is not None]
        if known:
            kept |= {min(known, key=lambda i: values[i] or 0.0), max(known, key=lambda i: values[i] or 0.0)}
    return sorted(kept)
