"""TrainedAdapter: one session's LoRA factors in flat fp32 buffers, kept in PEFT's layout; knows no pass."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smelt.configs import DecoderConfig
from smelt.errors import CheckpointError, InvalidInput
from smelt.models.adapter_folders import Adapter, Factors, Matrix, read_adapter, write_adapter
from smelt.training.factor_buffer import factor_views, num_values
from smelt.training.trained_weights import TrainedWeights

ALPHA = 32.0  # what is added is scaled by ALPHA / rank, as Tinker's clients take for granted
MAX_RANK = 512


class TrainedAdapter(TrainedWeights):
    """Factors A (r, in) and B (out, r) for the parts of fused matrices."""

    def __init__(
        self, config: DecoderConfig, matrices: Mapping[str, Matrix], rank: int, seed: int, device: torch.device
    ) -> None:
        """InvalidInput for a rank that cannot be, or where there is nothing to train."""
        if not 1 <= rank <= MAX_RANK:
            raise InvalidInput(f"the rank must be between 1 and {MAX_RANK}, not {rank}", "rank")
        if not matrices:
            reason = "train_attn, train_mlp and train_unembed are all false, so there is nothing to train"
            raise InvalidInput(reason, "train_attn")
        self.config, self.rank, self.seed, self.scale = config, rank, seed, ALPHA / rank
        self.matrices = dict(matrices)
        super().__init__(*(torch.zeros(num_values(self.matrices, rank), device=device) for _ in range(2)))
        self.factors, self.gradient_factors = self._views(self.masters), self._views(self.gradients)
        self._initialize(seed)

    def save_weights(self, folder: Path) -> None:
        """The factors alone, as `peft` reads them, in a folder that is made."""
        write_adapter(self.as_adapter(), self.config, folder)

    def _facts(self) -> dict[str, Any]:
        return {**super()._facts(), "matrices": list(self.matrices)}

    def _take(self, folder: Path) -> None:
        """Factors from PEFT's layout. What the folder does not hold is as at the beginning."""
        given = read_adapter(folder, self.config)
        self._initialize(self.seed)
        for name, parts in given.items():
            if name not in self.matrices:
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

    def _views(self, buffer: Tensor) -> dict[str, list[tuple[Tensor, Tensor]]]:
        """The factors' places in a flat buffer, part by part."""
        return {
            name: list(zip(torch.split(a, self.rank), torch.split(b, list(self.matrices[name].num_rows)), strict=True))
            for name, (a, b) in factor_views(buffer, self.matrices, self.rank).items()
        }
