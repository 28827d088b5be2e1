"""Checkpoints: a folder per step, whole or absent, written by a side thread; knows no loop and no loss.

A checkpoint is a model's or an adapter's folder as a recipe writes it (fp32 masters, so it loads anywhere) plus the
optimizer's moments and `state.json`. It is written under a temporary name, each file fsynced, a manifest with sizes and
CRC-32s last, then renamed, and the parent folder fsynced: a reader never sees half of one. `last` and `best` are
symbolic links beside the `checkpoints` folder, replaced atomically.

Where training needs the cores, the side thread works in small pieces with rests between them, until it is waited for.
"""

import json
import os
import shutil
import threading
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from smelt.disk import is_full, sync
from smelt.errors import CheckpointError, NotFound, OutOfSpace
from smelt.models.tensor_file import PIECE_BYTES, Pause, no_pause, write_tensors
from smelt.training.optim import LossScale, Optimizer
from smelt.training.throttle import Throttle

MANIFEST = "manifest.json"
STATE = "state.json"
OPTIMIZER = "optimizer.safetensors"
MOMENTS = ("exp_avg", "exp_avg_sq")
WAITING = "waiting."
PREFIX = "step-"
TEMPORARY = ".tmp-"
WRITER_SHARE = 0.01  # of a core, beside training on the same cores: see docs/experiments.md


@dataclass(frozen=True, slots=True)
class TrainState:
    """Where a run stands; with the tensors this is all that a bit-exact resume needs.

    Data order and dropout are functions of (seed, step), so no generator's state is kept.
    """

    step: int
    num_updates: int  # AdamW's own count: smaller than step where fp16 skipped some
    best_val_loss: float | None
    dataset: str  # its name
    dataset_sha256: str  # of its tokens
    compiled: bool
    dtype: str
    threads: int
    world_size: int
    torch_version: str
    loss_scale: float | None = None
    num_good_steps: int = 0
    num_worse: int = 0  # evaluations since the best one
    sharding: str = "none"


class WeightFiles(NamedTuple):
    """How a recipe keeps its weights: files that whoever serves the model reads, so that a checkpoint is a model."""

    write: Callable[[dict[str, Tensor], Path, Pause], None]  # tensors by parameter name, and all that belongs to them
    read: Callable[[Path], dict[str, Tensor]]  # the same tensors


class Checkpoints:
    """The checkpoints of one run; at most one is being written at a time."""

    def __init__(self, out_dir: Path, keep: int, weight_files: WeightFiles) -> None:
        self.out_dir = out_dir
        self.folder = out_dir / "checkpoints"
        self.keep = keep
        self.weight_files = weight_files
        self.warm: dict[str, Tensor] = {}  # reused: fresh memory costs three times the copy
        self.copied = threading.Event()
        self.copied.set()
        self.writer: threading.Thread | None = None
        self.throttle = Throttle(1.0, 0.0)
        self.begun_at = time.monotonic()  # when the last save began
        self.failure: Exception | None = None
        for leftover in self.folder.glob(f"{TEMPORARY}*"):
            shutil.rmtree(leftover)

    def forget_after(self, step: int) -> None:
        """Remove what lies beyond the step that a run resumes from: damaged, or about to be written again."""
        for folder in self.folder.glob(f"{PREFIX}*"):
            if folder.name > step_name(step):
                shutil.rmtree(folder)

    def gather(self, optimizer: Optimizer, *, keep: bool) -> None:
        """Bring a sharded optimizer's parts together, one tensor at a time; all ranks do, and who saves keeps them."""
        self.wait()
        for name, tensor in optimizer.buffers().items():
            whole = optimizer.whole(tensor)
            if keep:
                self._keep(name, whole)

    def save(self, optimizer: Optimizer, state: TrainState, is_best: bool) -> None:
        """Begin to save; returns at once. `wait_until_copied` must come before the next update."""
        self.wait()
        self.copied.clear()
        self.throttle = self._throttle(optimizer)
        self.writer = threading.Thread(
            target=self._save, args=(optimizer, state, is_best), name="checkpoint-writer", daemon=True
        )
        self.writer.start()

    def _throttle(self, optimizer: Optimizer) -> Throttle:
        """A small share where training needs the cores; all is on the disk halfway to the next save, at this pace."""
        before, self.begun_at = self.begun_at, time.monotonic()
        return Throttle(WRITER_SHARE if optimizer.device.type == "cpu" else 1.0, (self.begun_at - before) / 2)

    def wait_until_copied(self) -> None:
        """Return when the tensors may change again."""
        self.copied.wait()

    def wait(self) -> None:
        """Return when the last save is on disk; raises what went wrong with it."""
        self.throttle.hurry()
        if self.writer is not None:
            self.writer.join()
            self.writer = None
        if self.failure is not None:
            failure, self.failure = self.failure, None
            raise failure

    def _save(self, optimizer: Optimizer, state: TrainState, is_best: bool) -> None:
        waiting = optimizer.waiting()
        try:
            if not optimizer.is_sharded:  # else all of it was gathered just now
                self._copy(optimizer)
            self.copied.set()
            self.throttle.begin()
            self._write(optimizer, state, waiting)
            self._publish(state.step, is_best)
        except Exception as error:  # noqa: BLE001 handed to the training thread, which raises it
            self.failure = explain_full_disk(error, self.out_dir)
        finally:
            self.copied.set()

    def _copy(self, optimizer: Optimizer) -> None:
        for name, tensor in optimizer.buffers().items():
            self._keep(name, tensor)

    def _keep(self, name: str, tensor: Tensor) -> None:
        if name not in self.warm:
            self.warm[name] = torch.empty(tensor.shape, dtype=tensor.dtype)
        copy_on_this_thread(self.warm[name], tensor)

    def _write(self, optimizer: Optimizer, state: TrainState, waiting: dict[str, Tensor]) -> None:
        temporary = self.folder / f"{TEMPORARY}{os.getpid()}"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            rest = self.throttle.rest
            self.weight_files.write(optimizer.named(self.warm, "masters"), temporary, rest)
            moments = {
                f"{kind}.{name}": tensor
                for kind in MOMENTS
                for name, tensor in optimizer.named(self.warm, kind).items()
            }
            moments |= {f"{WAITING}{name}": tensor for name, tensor in waiting.items()}
            write_tensors(moments, temporary / OPTIMIZER, rest)
            (temporary / STATE).write_text(json.dumps(asdict(state), indent=1), encoding="utf-8")
            write_manifest(temporary, rest)
            final = self.folder / step_name(state.step)
            shutil.rmtree(final, ignore_errors=True)
            temporary.rename(final)
            sync(self.folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise

    def _publish(self, step: int, is_best: bool) -> None:
        point(self.out_dir / "last", self.folder / step_name(step))
        if is_best:
            point(self.out_dir / "best", self.folder / step_name(step))
        protected = {(self.out_dir / link).resolve() for link in ("last", "best")}
        for old in sorted(self.folder.glob(f"{PREFIX}*"))[: -self.keep]:
            if old.resolve() not in protected:
                shutil.rmtree(old)


def step_name(step: int) -> str:
    """The folder's name, which sorts by step."""
    return f"{PREFIX}{step:08d}"


def copy_on_this_thread(target: Tensor, source: Tensor) -> None:
    """Copy without waking torch's team of threads, whose cores training is using."""
    if source.device.type == "cpu":
        np.copyto(target.numpy(), source.numpy())
    else:
        target.copy_(source)


def explain_full_disk(error: Exception, folder: Path) -> Exception:
    """OutOfSpace in place of the many errors that a full disk causes; other errors as they are."""
    if isinstance(error, OutOfSpace) or (isinstance(error, OSError) and is_full(error)):
        free = shutil.disk_usage(folder).free
        return OutOfSpace(
            f"no space left for a checkpoint in {folder} ({free / 2**20:.0f} MiB free); the earlier checkpoints are "
            f"whole. Free some space, then continue with --init-from resume --out-dir {folder}"
        )
    return error


def write_manifest(folder: Path, pause: Pause = no_pause) -> None:
    """Sizes and checksums of every file, all fsynced before it; a folder without one is not a checkpoint.

    CRC-32 finds what disks and crashes do to a file, at eight times the speed of sha256, which is for forgers.
    """
    files = {}
    for path in sorted(folder.iterdir()):
        files[path.name] = {"size": path.stat().st_size, "crc32": crc32_of(path, pause)}
        sync(path)
    with (folder / MANIFEST).open("w", encoding="utf-8") as file:
        json.dump(files, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    sync(folder)


def crc32_of(path: Path, pause: Pause = no_pause) -> str:
    """A file's CRC-32 in hex, read in pieces."""
    crc, piece = 0, memoryview(bytearray(PIECE_BYTES))
    with path.open("rb", buffering=0) as file:
        while num_read := file.readinto(piece):
            crc = zlib.crc32(piece[:num_read], crc)
            pause()
    return f"{crc:08x}"


def point(link: Path, target: Path) -> None:
    """Make a symbolic link point at a sibling's child, replacing an older one atomically."""
    fresh = link.with_name(f"{TEMPORARY}{link.name}")
    with suppress(FileNotFoundError):
        fresh.unlink()
    fresh.symlink_to(os.path.relpath(target, link.parent))
    fresh.replace(link)
    sync(link.parent)


def check_manifest(folder: Path) -> None:
    """CheckpointError naming the first file that is missing or is not what was written."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        raise CheckpointError(f"{folder} is not a complete checkpoint: {MANIFEST} is missing or damaged") from None
    for name, expected in files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != expected["size"]:
            raise CheckpointError(f"checkpoint file {path} is missing or has the wrong size; use an older checkpoint")
        if crc32_of(path) != expected.get("crc32"):
            raise CheckpointError(f"checkpoint file {path} is damaged (its CRC-32 differs); use an older checkpoint")


def latest(out_dir: Path) -> Path:
    """The newest whole checkpoint: `last`, or the one before it where `last` is damaged.

    NotFound without any; CheckpointError where all are damaged.
    """
    found = sorted((out_dir / "checkpoints").glob(f"{PREFIX}*"), reverse=True)
    if not found:
        raise NotFound(f"no checkpoint to resume from in {out_dir}; start with --init-from scratch")
    damage: CheckpointError | None = None
    for folder in found:
        try:
            check_manifest(folder)
        except CheckpointError as error:
            damage = damage or error
        else:
            return folder
    assert damage is not None
    raise damage


def read_state(folder: Path) -> TrainState:
    """The run's position at a checkpoint."""
    return TrainState(**json.loads((folder / STATE).read_text(encoding="utf-8")))


def restore(folder: Path, weight_files: WeightFiles, optimizer: Optimizer) -> TrainState:
    """Load a checkpoint into an optimizer, and so into the model that it moves, bit for bit."""
    state = read_state(folder)
    own = optimizer.buffers()
    weights = weight_files.read(folder)
    for name, held in optimizer.named(own, "masters").items():
        _fill(optimizer, held, weights.pop(name, None), name, folder)
    with safe_open(folder / OPTIMIZER, "pt") as moments:  # one tensor after the other: they may be larger than the part
        known = set(moments.keys())
        for kind in MOMENTS:
            for name, held in optimizer.named(own, kind).items():
                found = moments.get_tensor(f"{kind}.{name}") if f"{kind}.{name}" in known else None
                _fill(optimizer, held, found, name, folder)
        waiting = {name.removeprefix(WAITING) for name in known if name.startswith(WAITING)}
        optimizer.wait_again({name: moments.get_tensor(WAITING + name) for name in waiting})
    optimizer.num_steps = state.num_updates
    if state.loss_scale is not None and optimizer.loss_scale is not None:
        optimizer.loss_scale = LossScale(state.loss_scale, state.num_good_steps)
    optimizer.publish()
    return state


def _fill(optimizer: Optimizer, held: Tensor, source: Tensor | None, name: str, folder: Path) -> None:
    if source is None or source.shape != held.shape:
        found = "nothing" if source is None else f"shape {tuple(source.shape)}"
        raise CheckpointError(f"checkpoint {folder}: {name} needs shape {tuple(held.shape)}, found {found}")
    optimizer.fill(held, source)
