"""Batch: the one thing that enters a sequence model; knows no model, no loss and no tokenizer."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

NO_TARGET = -100  # a position with this target has no loss (PyTorch's ignore_index)
NO_ADAPTER = -1


@dataclass(slots=True)
class Batch:
    """Packed tokens: B rows of T tokens, each row one or several segments one after the other.

    `positions` None means 0..T-1 in every row; `segment_ids` None means that a row is one segment,
    otherwise attention stays within equal ids of a row.
    """

    tokens: Tensor  # (B, T) int64
    targets: Tensor | None = None  # (B, T) int64, NO_TARGET where there is no loss
    positions: Tensor | None = None  # (B, T) int64
    segment_ids: Tensor | None = None  # (B, T) int64
    adapter_ids: Tensor | None = None  # (B, T) int64 on the CPU: the slot of each token's adapter, or NO_ADAPTER
    loss_inputs: dict[str, Tensor] = field(default_factory=dict)  # (B, T) each: weights, advantages, ...

    @property
    def num_targets(self) -> int:
        """Positions that carry a loss."""
        return 0 if self.targets is None else int((self.targets != NO_TARGET).sum())

    def to(self, device: torch.device) -> "Batch":
        """The same batch on a device; the copy overlaps with compute where the memory is pinned."""

        def move(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device, non_blocking=True)

        return Batch(
            tokens=self.tokens.to(device, non_blocking=True),
            targets=move(self.targets),
            positions=move(self.positions),
            segment_ids=move(self.segment_ids),
            adapter_ids=self.adapter_ids,
            loss_inputs={name: value.to(device, non_blocking=True) for name, value in self.loss_inputs.items()},
        )
