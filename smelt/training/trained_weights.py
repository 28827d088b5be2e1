"""TrainedWeights: what every session trains, as flat fp32 buffers with a gradient and an optimizer; knows no pass.

Kinds of sessions differ in what their values mean and how these are kept. A checkpoint has the weights as other
programs read them, and the optimizer beside them. A `state` is more: with the gradient that waits for its step, it is
all that the session's next operation depends on.
"""

import json
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from smelt.errors import CheckpointError, NotFound, TrainingError
from smelt.models.tensor_file import write_tensors
from smelt.training.optim import Update, adamw_

OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "session.json"
MASTERS = "masters"


@dataclass(frozen=True, slots=True)
class OptimSettings:
    """AdamW with decoupled decay (Loshchilov and Hutter 2019); `grad_clip_norm` 0 does not clip."""

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0


@dataclass(frozen=True, slots=True)
class State:
    """A session at one moment, bit for bit."""

    tensors: dict[str, Tensor]
    facts: dict[str, Any]

    def write(self, folder: Path) -> None:
        """Into a folder, which is made."""
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(self.tensors, folder / OPTIMIZER_FILE)
        write_facts(self.facts, folder)


class TrainedWeights(ABC):
    """Values in `masters`, the gradient since the last step in `gradients`. Compared by identity.

    `rounded` are the same values in another dtype, where these are computed with.
    """

    rank: int  # of an adapter; 0 where all weights of a model are trained
    seed: int

    def __init__(self, masters: Tensor, gradients: Tensor, rounded: Tensor | None = None) -> None:
        self.masters, self.gradients, self._rounded = masters, gradients, rounded
        self.num_steps = 0
        self._moments = (torch.zeros_like(masters), torch.zeros_like(masters))
        self._has_failed = False

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
        betas = settings.beta1, settings.beta2
        update = Update(settings.learning_rate, betas, settings.weight_decay, settings.eps)
        adamw_([self.masters], [self.gradients], [self._moments], self.num_steps, update)
        self.num_steps += 1
        self._publish()

    def _clear(self) -> None:
        self.gradients.zero_()
        self._has_failed = False

    def save(self, folder: Path) -> None:
        """Weights and optimizer; a gradient that waits for its step is not part of a checkpoint."""
        self.save_weights(folder)
        write_tensors(self._beside_weights(), folder / OPTIMIZER_FILE)
        write_facts(self._facts(), folder)

    def load(self, folder: Path, *, with_optimizer: bool) -> None:
        """Go on from a checkpoint, or from weights alone, with its optimizer or a fresh one.

        NotFound, CheckpointError or UnsupportedModel where the folder does not hold what is asked for.
        """
        self._take(folder)
        self._publish()
        self._clear()
        for moment in self._moments:
            moment.zero_()
        self.num_steps = 0
        if with_optimizer:
            facts = facts_of(folder)
            self._copy_into(read_optimizer(folder), self._beside_weights(), folder)
            self.num_steps = int(facts["num_steps"])

    def state(self) -> State:
        """A copy of all that the next operation depends on."""
        return State({name: tensor.clone() for name, tensor in self._tensors().items()}, self._facts())

    def read_state(self, folder: Path) -> None:
        """What a State has written. CheckpointError where it is damaged or another session's."""
        facts = facts_of(folder)
        self._copy_into(read_optimizer(folder), self._tensors(), folder)
        self.num_steps, self._has_failed = int(facts["num_steps"]), bool(facts["has_failed"])
        self._publish()

    @abstractmethod
    def save_weights(self, folder: Path) -> None:
        """The weights alone, as other programs read them, in a folder that is made."""

    @abstractmethod
    def _take(self, folder: Path) -> None:
        """The weights of a folder."""

    def _publish(self) -> None:
        """The masters have changed."""
        if self._rounded is not None:
            self._rounded.copy_(self.masters)

    def _beside_weights(self) -> dict[str, Tensor]:
        """What a checkpoint holds that `save_weights` does not write."""
        exact = {} if self._rounded is None else {MASTERS: self.masters}
        return {"exp_avg": self._moments[0], "exp_avg_sq": self._moments[1], **exact}

    def _tensors(self) -> dict[str, Tensor]:
        names = (MASTERS, "gradients", "exp_avg", "exp_avg_sq")
        return dict(zip(names, (self.masters, self.gradients, *self._moments), strict=True))

    def _facts(self) -> dict[str, Any]:
        return {"rank": self.rank, "seed": self.seed, "num_steps": self.num_steps, "has_failed": self._has_failed}

    def _copy_into(self, tensors: dict[str, Tensor], targets: dict[str, Tensor], folder: Path) -> None:
        for name, target in targets.items():
            if name not in tensors or tensors[name].shape != target.shape:
                what = f"an adapter of rank {self.rank}" if self.rank else "all weights"
                raise CheckpointError(f"{folder} does not belong to {what} of this model: {name}")
            target.copy_(tensors[name])


def facts_of(folder: Path) -> dict[str, Any]:
    """What is written of a checkpoint or a state: rank, seed, steps. NotFound, CheckpointError."""
    path = folder / STATE_FILE
    if not path.is_file():
        raise NotFound(f"{path} does not exist")
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None


def write_facts(facts: dict[str, Any], folder: Path) -> None:
    """What `facts_of` reads."""
    (folder / STATE_FILE).write_text(json.dumps(facts, indent=1), encoding="utf-8")


def read_optimizer(folder: Path) -> dict[str, Tensor]:
    """The tensors beside a checkpoint's weights, or those of a state. NotFound, CheckpointError."""
    path = folder / OPTIMIZER_FILE
    if not path.is_file():
        raise NotFound(f"{path} does not exist")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None
