"""Keys and values of the running sequences, one slot each; knows no model, no sampling and no tokens.

Shapes: S slots, G key/value heads, L positions, D width of a head; B rows that are computed, T tokens of each.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from smelt.configs import DecoderConfig
from smelt.models.layers import Attend

INITIAL_LENGTH = 128


class SlotCache:
    """Room for `num_slots` sequences of at most `block_size` tokens; memory grows with the longest one so far."""

    def __init__(self, config: DecoderConfig, num_slots: int, dtype: torch.dtype, device: torch.device) -> None:
        self.config = config
        self.grouped = config.n_kv_head != config.n_head
        length = min(INITIAL_LENGTH, config.block_size)
        shape = (2, num_slots, config.n_kv_head, length, config.head_dim)
        # Zeros, not whatever was there: a masked position has weight 0, but 0 x NaN is NaN.
        self.layers = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.n_layer)]

    @property
    def length(self) -> int:
        """Positions there is room for now."""
        return self.layers[0].shape[3]

    def reserve(self, num_positions: int) -> None:
        """Make room for so many positions in every slot, at least doubling what is there."""
        if num_positions <= self.length:
            return
        grown = min(max(num_positions, 2 * self.length), self.config.block_size)
        self.layers = [F.pad(layer, (0, 0, 0, grown - self.length)) for layer in self.layers]

    @torch.inference_mode()
    def move(self, source: int, target: int) -> None:
        """Bring a slot's content to another one."""
        for layer in self.layers:
            layer[:, target] = layer[:, source]

    def attend_prompts(self, slots: list[int], num_tokens: int) -> Attend:
        """Attention over whole prompts of one length, which are remembered in these slots."""
        self.reserve(num_tokens)
        window = self.config.sliding_window
        mask = None
        if window is not None and window < num_tokens:
            order = torch.arange(num_tokens, device=self.layers[0].device)
            distance = order[:, None] - order[None, :]
            mask = (distance >= 0) & (distance < window)

        def attend(layer: int, q_BHTD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor) -> Tensor:
            cache = self.layers[layer]
            cache[0, slots, :, :num_tokens] = k_BGTD
            cache[1, slots, :, :num_tokens] = v_BGTD
            return F.scaled_dot_product_attention(
                q_BHTD, k_BGTD, v_BGTD, mask, is_causal=mask is None, enable_gqa=self.grouped
            )

        return attend

    def attend_next(self, positions: list[int]) -> Attend:
        """Attention of one new token per slot 0..B-1, at these positions, to itself and all before it."""
        num_rows, num_keys = len(positions), max(positions) + 1
        self.reserve(num_keys)
        device = self.layers[0].device
        rows = torch.arange(num_rows, device=device)
        at = torch.tensor(positions, device=device)
        mask = self._visible_keys(positions, at, num_keys)

        def attend(layer: int, q_BHTD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor) -> Tensor:
            keys, values = self.layers[layer]
            keys[rows, :, at] = k_BGTD[:, :, 0]
            values[rows, :, at] = v_BGTD[:, :, 0]
            return F.scaled_dot_product_attention(
                q_BHTD, keys[:num_rows, :, :num_keys], values[:num_rows, :, :num_keys], mask, enable_gqa=self.grouped
            )

        return attend

    def _visible_keys(self, positions: list[int], at: Tensor, num_keys: int) -> Tensor | None:
        """(B, 1, 1, L) true where a row's token may look; None where every row sees every key."""
        window = self.config.sliding_window or num_keys
        if min(positions) + 1 == num_keys <= window:
            return None
        keys = torch.arange(num_keys, device=at.device)
        visible = (keys[None, :] <= at[:, None]) & (keys[None, :] > at[:, None] - window)
        return visible[:, None, None, :]
