"""TrainedAdapter: one session's factors with their gradient and optimizer, in flat fp32 buffers; knows no pass.

Weights are kept in PEFT's layout, the optimizer beside them. A snapshot is more: with the gradient that waits for its
step, it is all that the session's next operation depends on.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.optim.adamw import adamw

from smelt.configs import DecoderConfig
from smelt.errors import CheckpointError, InvalidInput, NotFound, TrainingError
from smelt.models.adapter_folders import Adapter, Factors, Matrix, read_adapter, write_adapter
from smelt.models.tensor_file import write_tensors

ALPHA = 32.0  # what is added is scaled by ALPHA / rank, as Tinker's clients take for granted
MAX_RANK = 512
OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "session.json"


@dataclass(frozen=True, slots=True)
class OptimSettings:
    """AdamW with decoupled decay (Loshchilov and Hutter 2019); `grad_clip_norm` 0 does not clip."""

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0


class TrainedAdapter:
    """LoRA factors A (r, in) and B (out, r) for the parts of fused matrices. Compared by identity."""

    def __init__(
        self, config: DecoderConfig, matrices: Mapping[str, Matrix], rank: int, seed: int, device: torch.device
    ) -> None:
        """InvalidInput for a rank that cannot be, or where there is nothing to train."""
        if not 1 <= rank <= MAX_RANK:
            raise InvalidInput(f"the rank must be between 1 and {MAX_RANK}, not {rank}", "rank")
        if not matrices:
            raise InvalidInput(
                "train_attn, train_mlp, train_unembed: all false, so there is nothing to train", "train_attn"
            )
        self.config, self.rank, self.seed, self.scale = config, rank, seed, ALPHA / rank
        self.num_steps = 0
        self._matrices = dict(matrices)
        self._has_failed = False
        self.masters = torch.zeros(self._num_values(), device=device)
        self.gradients = torch.zeros_like(self.masters)
        self._moments = (torch.zeros_like(self.masters), torch.zeros_like(self.masters))
        self.factors, self.gradient_factors = self._views(self.masters), self._views(self.gradients)
        self._initialize(seed)

    @property
    def num_values(self) -> int:
        """Values that are trained."""
        return self.masters.numel()

    def fail_window(self) -> None:
        """A part of the gradient since the last step is missing, so the next step must not be taken."""
        self._has_failed = True

    def step(self, settings: OptimSettings) -> dict[str, float]:
        """Step with the gradient, and clear it. TrainingError, and no step, where a part of it has failed."""
        if self._has_failed:
            self._clear()
            raise TrainingError("a forward_backward since the last step has failed: its gradient is dropped")
        norm = float(torch.linalg.vector_norm(self.gradients))
        if not math.isfinite(norm):
            self._clear()
            raise TrainingError(f"the gradient's norm is {norm}: it is dropped, and the weights stay as they were")
        if 0 < settings.grad_clip_norm < norm:
            self.gradients.mul_(settings.grad_clip_norm / norm)
        self._update(settings)
        self._clear()
        return {"grad_norm": norm, "learning_rate": settings.learning_rate, "step": float(self.num_steps)}

    @torch.no_grad()
    def _update(self, settings: OptimSettings) -> None:
        adamw(
            [self.masters],
            [self.gradients],
            [self._moments[0]],
            [self._moments[1]],
            [],
            [torch.tensor(float(self.num_steps))],
            foreach=False,
            fused=self.masters.device.type == "cpu",
            amsgrad=False,
            beta1=settings.beta1,
            beta2=settings.beta2,
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay,
            eps=settings.eps,
            maximize=False,
        )
        self.num_steps += 1

    def _clear(self) -> None:
        self.gradients.zero_()
        self._has_failed = False

    def save_weights(self, folder: Path) -> None:
        """The factors alone, as `peft` reads them, in a folder that is made."""
        write_adapter(self.as_adapter(), self.config, folder)

    def save(self, folder: Path) -> None:
        """Factors and optimizer; a gradient that waits for its step is not part of a checkpoint."""
        self.save_weights(folder)
        moments = {"exp_avg": self._moments[0], "exp_avg_sq": self._moments[1]}
        write_tensors(moments, folder / OPTIMIZER_FILE)
        self._write_facts(folder)

    def load(self, folder: Path, *, with_optimizer: bool) -> None:
        """Go on from a checkpoint, or from any adapter of PEFT's, with its optimizer or a fresh one.

        NotFound, CheckpointError or UnsupportedModel where the folder does not hold what is asked for.
        """
        self._take(folder)
        self._clear()
        for moment in self._moments:
            moment.zero_()
        self.num_steps = 0
        if with_optimizer:
            tensors, facts = _read(folder / OPTIMIZER_FILE), _read_facts(folder)
            self._copy_into(tensors, {"exp_avg": self._moments[0], "exp_avg_sq": self._moments[1]}, folder)
            self.num_steps = int(facts["num_steps"])

    def write_state(self, folder: Path) -> None:
        """All that the next operation depends on, bit for bit, in a folder that is made."""
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(self._state(), folder / OPTIMIZER_FILE)
        self._write_facts(folder)

    def read_state(self, folder: Path) -> None:
        """What `write_state` has written. CheckpointError where it is damaged or another session's."""
        facts = _read_facts(folder)
        self._copy_into(_read(folder / OPTIMIZER_FILE), self._state(), folder)
        self.num_steps, self._has_failed = int(facts["num_steps"]), bool(facts["has_failed"])

    def _state(self) -> dict[str, Tensor]:
        names = ("masters", "gradients", "exp_avg", "exp_avg_sq")
        return dict(zip(names, (self.masters, self.gradients, *self._moments), strict=True))

    def _write_facts(self, folder: Path) -> None:
        facts = {
            "rank": self.rank,
            "seed": self.seed,
            "num_steps": self.num_steps,
            "has_failed": self._has_failed,
            "matrices": list(self._matrices),
        }
        (folder / STATE_FILE).write_text(json.dumps(facts, indent=1), encoding="utf-8")

    def _copy_into(self, tensors: dict[str, Tensor], targets: dict[str, Tensor], folder: Path) -> None:
        for name, target in targets.items():
            if name not in tensors or tensors[name].shape != target.shape:
                raise CheckpointError(
                    f"{folder} does not belong to an adapter of rank {self.rank} of this model: {name}"
                )
            target.copy_(tensors[name])

    def _take(self, folder: Path) -> None:
        """Factors from PEFT's layout. What the folder does not hold is as at the beginning."""
        given = read_adapter(folder, self.config)
        self._initialize(self.seed)
        for name, parts in given.items():
            if name not in self._matrices:
                raise CheckpointError(f"{folder} changes {name}, which this session does not train")
            for (a, b), factors in zip(self.factors[name], parts, strict=True):
                if factors is None:
                    continue
                if factors.a.shape != a.shape:
                    raise CheckpointError(f"{folder} has the rank {len(factors.a)}, and this session {self.rank}")
                a.copy_(factors.a)
                b.copy_(factors.b * (factors.scale / self.scale))

    def as_adapter(self) -> Adapter:
        """The factors as an engine takes them, which copies them."""
        return {name: tuple(Factors(a, b, self.scale) for a, b in pairs) for name, pairs in self.factors.items()}

    @torch.no_grad()
    def _initialize(self, seed: int) -> None:
        """A uniform within 1/sqrt(in), B zero, as PEFT begins."""
        generator = torch.Generator().manual_seed(seed)
        for pairs in self.factors.values():
            for a, b in pairs:
                bound = 1 / math.sqrt(a.shape[1])
                a.copy_(torch.rand(a.shape, generator=generator) * (2 * bound) - bound)
                b.zero_()

    def _num_values(self) -> int:
        return sum(
            self.rank * (matrix.width + num_rows) for matrix in self._matrices.values() for num_rows in matrix.num_rows
        )

    def _views(self, buffer: Tensor) -> dict[str, list[tuple[Tensor, Tensor]]]:
        """The factors' places in a flat buffer."""
        views: dict[str, list[tuple[Tensor, Tensor]]] = {}
        start = 0
        for name, matrix in self._matrices.items():
            views[name] = []
            for num_rows in matrix.num_rows:
                sizes = [self.rank * matrix.width, num_rows * self.rank]
                a, b = torch.split(buffer[start : start + sum(sizes)], sizes)
                views[name].append((a.view(self.rank, matrix.width), b.view(num_rows, self.rank)))
                start += sum(sizes)
        return views


def facts_of(folder: Path) -> dict[str, Any]:
    """What is written of a checkpoint or a snapshot: rank, seed, steps. NotFound, CheckpointError."""
    return _read_facts(folder)


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise NotFound(f"{path} does not exist")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None


def _read_facts(folder: Path) -> dict[str, Any]:
    path = folder / STATE_FILE
    if not path.is_file():
        raise NotFound(f"{path} does not exist")
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None
