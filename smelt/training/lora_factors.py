"""LoRA factors as parameters of a frozen model, for a run that trains them alone; knows no loss and no run.

    y += alpha / rank B (A x)        for the matrices that are chosen

They become a part of the model, so that the optimizer, checkpoints and ranks treat them as they treat all weights.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smelt.errors import ConfigError
from smelt.models.adapter_folders import (
    UNEMBEDDING,
    Adapter,
    Factors,
    Matrix,
    matrices_of,
    part_of,
    read_adapter,
    write_adapter,
)
from smelt.models.decoder import Decoder
from smelt.models.tensor_file import Pause
from smelt.training.checkpoint import WeightFiles

PREFIX = "lora."  # of the parameters' names in the model
KINDS = ("attention", "mlp")


class LoraFactors(nn.Module):
    """A (rank, in) and B (out, rank) for each part of a fused matrix that `targets` names; B begins as zero."""

    def __init__(self, model: Decoder, rank: int, alpha: float, targets: str, seed: int) -> None:
        """Freezes the model and becomes its `lora`. ConfigError where `targets` names none of its matrices."""
        super().__init__()
        self.shape, self.rank, self.scale = model.config, rank, alpha / rank
        # The unembedding stays: its factors are as wide as the vocabulary.
        self.matrices = {name: m for name, m in matrices_of(model.config).items() if name != UNEMBEDDING}
        self.chosen = chosen_parts(self.matrices, targets)
        generator = torch.Generator().manual_seed(seed)
        for name, parts in self.chosen.items():
            for part in parts:
                bound = 1 / math.sqrt(self.matrices[name].width)  # as PEFT begins
                a = torch.rand(rank, self.matrices[name].width, generator=generator) * (2 * bound) - bound
                self.register_parameter(_key(name, part, "a"), nn.Parameter(a))
                self.register_parameter(
                    _key(name, part, "b"), nn.Parameter(torch.zeros(self.matrices[name].num_rows[part], rank))
                )
        model.requires_grad_(False)
        model.add_module(PREFIX.rstrip("."), self)
        for name in self.chosen:
            model.get_submodule(name).register_forward_hook(self._hook(name))

    def _hook(self, name: str) -> Any:
        parts = self.chosen[name]

        def add(_module: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor:
            pairs = [(self.get_parameter(_key(name, p, "a")), self.get_parameter(_key(name, p, "b"))) for p in parts]
            hidden = F.linear(args[0], torch.cat([a for a, _ in pairs])) * self.scale
            rows = list(torch.split(y, list(self.matrices[name].num_rows), dim=-1))
            for part, (_, b), h in zip(parts, pairs, torch.split(hidden, self.rank, dim=-1), strict=True):
                rows[part] = rows[part] + F.linear(h, b)
            return rows[0] if len(rows) == 1 else torch.cat(rows, dim=-1)

        return add

    def files(self, base: str) -> WeightFiles:
        """The factors as a folder that `peft` reads; `base` is where the model is that they belong to."""

        def write(tensors: dict[str, Tensor], folder: Path, pause: Pause) -> None:
            write_adapter(self.adapter_of(tensors), self.shape, folder, base, pause)

        return WeightFiles(write, lambda folder: self.tensors_of(read_adapter(folder, self.shape)))

    def adapter_of(self, tensors: Mapping[str, Tensor]) -> Adapter:
        """Tensors by the names that they have in the model, as an adapter."""
        return {
            name: tuple(
                Factors(tensors[PREFIX + _key(name, part, "a")], tensors[PREFIX + _key(name, part, "b")], self.scale)
                if part in parts
                else None
                for part in range(len(self.matrices[name].num_rows))
            )
            for name, parts in self.chosen.items()
        }

    def tensors_of(self, adapter: Adapter) -> dict[str, Tensor]:
        """The way back. What the adapter changes besides is left out."""
        return {
            PREFIX + _key(name, part, factor): tensor
            for name, parts in adapter.items()
            for part, factors in enumerate(parts)
            if factors is not None
            for factor, tensor in (("a", factors.a), ("b", factors.b))
        }


def chosen_parts(matrices: Mapping[str, Matrix], targets: str) -> dict[str, list[int]]:
    """Of each matrix the parts that are trained: "all", a kind of them, or names as in PEFT's target_modules."""
    wanted = {word.strip() for word in targets.split(",") if word.strip()}
    known = {name.rpartition(".")[2] for matrix in matrices.values() for name in matrix.names}
    if unknown := sorted(wanted - known - {"all", *KINDS}):
        raise ConfigError(
            f"lora_targets: this model has no {', '.join(unknown)}; it has all, attention, mlp, "
            f"{', '.join(sorted(known))}"
        )
    chosen = {
        name: [
            part
            for part, theirs in enumerate(matrix.names)
            if wanted & {"all", part_of(name), theirs.rpartition(".")[2]}
        ]
        for name, matrix in matrices.items()
    }
    if not any(chosen.values()):
        raise ConfigError("lora_targets names nothing: give all, attention, mlp, or modules as q_proj,v_proj")
    return {name: parts for name, parts in chosen.items() if parts}


def _key(name: str, part: int, factor: str) -> str:
    """A parameter's name, which cannot have dots."""
    return f"{name.replace('.', '/')}/{part}/{factor}"
