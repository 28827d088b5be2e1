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

from smelt.configs import DecoderConfig
from smelt.errors import ConfigError, UnsupportedModel
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
    """A (rank, in) and B (out, rank) for each part of a fused matrix that an adapter changes, beginning as it is."""

    def __init__(self, model: Decoder, adapter: Adapter) -> None:
        """Freezes the model and becomes its `lora`. UnsupportedModel where such an adapter cannot be trained here."""
        super().__init__()
        self.shape, self.matrices = model.config, trained_matrices(model.config)
        self.rank, self.scale = rank_and_scale(adapter)
        self.chosen = parts_of(adapter)
        for name, parts in adapter.items():
            for part, factors in enumerate(parts):
                if factors is not None:
                    self.register_parameter(_key(name, part, "a"), nn.Parameter(factors.a.float()))
                    self.register_parameter(_key(name, part, "b"), nn.Parameter(factors.b.float()))
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


def fresh_adapter(config: DecoderConfig, rank: int, alpha: float, targets: str, seed: int) -> Adapter:
    """One that changes nothing yet: A is drawn as PEFT draws it, and B is zero. ConfigError as in `chosen_parts`."""
    matrices, generator = trained_matrices(config), torch.Generator().manual_seed(seed)

    def drawn(matrix: Matrix, part: int) -> Factors:
        bound = 1 / math.sqrt(matrix.width)
        a = torch.rand(rank, matrix.width, generator=generator) * (2 * bound) - bound
        return Factors(a, torch.zeros(matrix.num_rows[part], rank), alpha / rank)

    return {
        name: tuple(
            drawn(matrices[name], part) if part in parts else None for part in range(len(matrices[name].num_rows))
        )
        for name, parts in chosen_parts(matrices, targets).items()
    }


def trained_matrices(config: DecoderConfig) -> dict[str, Matrix]:
    """What a run can train. The unembedding stays: its factors are as wide as the vocabulary."""
    return {name: matrix for name, matrix in matrices_of(config).items() if name != UNEMBEDDING}


def parts_of(adapter: Adapter) -> dict[str, list[int]]:
    """Of each matrix the parts that an adapter changes."""
    return {name: [part for part, each in enumerate(parts) if each is not None] for name, parts in adapter.items()}


def rank_and_scale(adapter: Adapter) -> tuple[int, float]:
    """Those that all factors of an adapter have. UnsupportedModel where they differ, or the unembedding has some."""
    found = {(len(each.a), each.scale) for parts in adapter.values() for each in parts if each is not None}
    if len(found) > 1:
        raise UnsupportedModel("its matrices have several ranks or scales, and a run trains one of each")
    if UNEMBEDDING in adapter:
        raise UnsupportedModel("it changes the unembedding, which a run leaves as it is")
    return found.pop()


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
