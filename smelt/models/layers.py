"""The parts of a decoder block as functions and small modules; knows no whole model and no weights on disk.

Shapes: B rows, T tokens, C width, H query heads, G key/value heads, D width of a head.
"""

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smelt.configs import DecoderConfig
from smelt.models.batch import Batch
from smelt.models.linear import Linear
from smelt.models.rowwise import LayerNorm, RMSNorm, add, gelu_tanh, kernels_for, norm_heads, rotate, swiglu

# (layer, q_BTHD, k_BTGD, v_BTGD) -> out_BTHD: how queries meet keys. Training attends within the
# batch; the inference engine passes one that reads and writes its cache.
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


def make_norm(config: DecoderConfig, width: int) -> nn.Module:
    """The LayerNorm or RMSNorm that the config names."""
    if config.norm == "rmsnorm":
        return RMSNorm(width, eps=config.norm_eps)
    return LayerNorm(width, eps=config.norm_eps, bias=config.bias)


def rope_frequencies(config: DecoderConfig, device: torch.device) -> Tensor:
    """Inverse wavelengths (D/2,) in fp32 (RoFormer, eq. 15), stretched as Llama 3 does where asked for.

    Computed anew each time: a buffer would be rounded along with the weights by `model.to(bfloat16)`.
    """
    exponents = torch.arange(0, config.head_dim, 2, device=device).float() / config.head_dim
    frequencies = 1.0 / (config.rope_theta**exponents)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    rotations = scaling.original_block_size * frequencies / (2 * torch.pi)
    blend = (rotations - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = blend.clamp(0, 1)
    return frequencies * (blend + (1 - blend) / scaling.factor)


@cache
def _kept_frequencies(config: DecoderConfig) -> Tensor:
    """`rope_frequencies` on the CPU, where every step of an engine asks for them."""
    with torch.inference_mode(mode=False):
        return rope_frequencies(config, torch.device("cpu"))


def rotary_tables(config: DecoderConfig, positions_BT: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What `rotate` takes for tokens at these positions, (B, T, 1, D) each, computed in fp32 whatever `dtype` is."""
    if len(positions_BT) == 1 and (fast := kernels_for(positions_BT, dtype)) is not None:
        cos_ND, sin_ND = fast.rotary_tables(positions_BT[0], _kept_frequencies(config), dtype)
        return cos_ND[None, :, None], sin_ND[None, :, None]
    angles = positions_BT[..., None].float() * rope_frequencies(config, positions_BT.device)
    cos, sin = angles.cos(), angles.sin()
    tables = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
    return tables[0].to(dtype)[:, :, None], tables[1].to(dtype)[:, :, None]


def attention_mask(batch: Batch, sliding_window: int | None) -> Tensor | None:
    """(B, 1, T, T) true where a query may see a key, or None where plain causal attention says it all."""
    num_tokens = batch.tokens.shape[1]
    windowed = sliding_window is not None and sliding_window < num_tokens
    if batch.segment_ids is None and not windowed:
        return None
    order = torch.arange(num_tokens, device=batch.tokens.device)
    allowed = order[:, None] >= order[None, :]
    if windowed and sliding_window is not None:
        allowed = allowed & (order[:, None] - order[None, :] < sliding_window)
    allowed = allowed[None, None]
    if batch.segment_ids is not None:
        allowed = allowed & (batch.segment_ids[:, None, :, None] == batch.segment_ids[:, None, None, :])
    return allowed


def attend_within(batch: Batch, config: DecoderConfig, dropout: float, *, fused: bool = False) -> Attend:
    """Causal attention inside each row (and segment) of a batch; `fused`: rounded as the engine's, fast or not."""
    mask = attention_mask(batch, config.sliding_window)
    grouped = config.n_kv_head != config.n_head

    def attend(_layer: int, q_BTHD: Tensor, k_BTGD: Tensor, v_BTGD: Tensor) -> Tensor:
        q_BHTD, k_BGTD, v_BGTD = (x.transpose(1, 2) for x in (q_BTHD, k_BTGD, v_BTGD))
        if not fused and prefers_written_out(q_BHTD):
            return written_out_attention(q_BHTD, k_BGTD, v_BGTD, mask, dropout).transpose(1, 2)
        return F.scaled_dot_product_attention(
            q_BHTD, k_BGTD, v_BGTD, mask, dropout, is_causal=mask is None, enable_gqa=grouped
        ).transpose(1, 2)

    return attend


def prefers_written_out(q_BHTD: Tensor) -> bool:
    """Short rows in bf16 on a CPU: the fused kernel's backward runs at a tenth of the speed of AMX products."""
    return q_BHTD.device.type == "cpu" and q_BHTD.dtype == torch.bfloat16 and q_BHTD.shape[2] <= 512


def written_out_attention(
    q_BHTD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor, mask: Tensor | None, dropout: float
) -> Tensor:
    """softmax(q k^T / sqrt(D)) v with the scores in memory; `mask` None means causal."""
    num_tokens, width = q_BHTD.shape[2:]
    if mask is None:
        mask = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=q_BHTD.device).tril()
    if (num_shared := q_BHTD.shape[1] // k_BGTD.shape[1]) > 1:
        k_BGTD, v_BGTD = (x.repeat_interleave(num_shared, dim=1) for x in (k_BGTD, v_BGTD))
    scores_BHTT = torch.matmul(q_BHTD * width**-0.5, k_BGTD.transpose(-1, -2))
    scores_BHTT = scores_BHTT.masked_fill(~mask, float("-inf"))
    weights_BHTT = torch.softmax(scores_BHTT, dim=-1, dtype=torch.float32).to(q_BHTD.dtype)
    return torch.matmul(F.dropout(weights_BHTT, dropout, dropout > 0), v_BGTD)


class Attention(nn.Module):
    """Multi-head attention with grouped keys; where the keys come from is `attend`'s business."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.num_heads, self.num_kv_heads, self.head_dim = config.n_head, config.n_kv_head, config.head_dim
        num_packed = config.n_head + 2 * config.n_kv_head
        self.qkv = Linear(config.n_embd, num_packed * config.head_dim, bias=config.qkv_bias)
        self.out = Linear(config.n_head * config.head_dim, config.n_embd, bias=config.bias)
        self.q_norm = RMSNorm(config.head_dim, eps=config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, eps=config.norm_eps) if config.qk_norm else None

    def forward(self, x_BTC: Tensor, rotary: tuple[Tensor, Tensor] | None, attend: Attend) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        num_rows, num_tokens, _ = x_BTC.shape
        packed = self.qkv(x_BTC).view(num_rows, num_tokens, -1, self.head_dim)
        # Queries and keys stay side by side until they are rotated: one pass instead of two.
        qk_BTHD, v_BTGD = packed.split_with_sizes((self.num_heads + self.num_kv_heads, self.num_kv_heads), 2)
        if self.q_norm is not None and self.k_norm is not None:
            qk_BTHD = norm_heads(qk_BTHD, self.q_norm, self.k_norm, self.num_heads)
        if rotary is not None:
            qk_BTHD = rotate(qk_BTHD, *rotary)
        q_BTHD, k_BTGD = qk_BTHD.split_with_sizes((self.num_heads, self.num_kv_heads), 2)
        mixed_BTHD = attend(self.layer, q_BTHD, k_BTGD, v_BTGD)
        return self.out(mixed_BTHD.reshape(num_rows, num_tokens, -1))


class MLP(nn.Module):
    """GELU (tanh form as GPT-2, or exact as nanoGPT) or SwiGLU with gate and up projections in one product."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gated = config.mlp == "swiglu"
        self.gelu = F.gelu if config.mlp == "gelu_exact" else gelu_tanh
        self.up = Linear(config.n_embd, config.n_inner * (2 if self.gated else 1), bias=config.bias)
        self.down = Linear(config.n_inner, config.n_embd, bias=config.bias)

    def forward(self, x_BTC: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        hidden = self.up(x_BTC)
        if self.gated:
            return self.down(swiglu(hidden))
        return self.down(self.gelu(hidden))


class Block(nn.Module):
    """Pre-norm residual block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: DecoderConfig, layer: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm = make_norm(config, config.n_embd)
        self.attention = Attention(config, layer)
        self.mlp_norm = make_norm(config, config.n_embd)
        self.mlp = MLP(config)
        self.dropout = dropout

    def forward(self, x_BTC: Tensor, rotary: tuple[Tensor, Tensor] | None, attend: Attend) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        x_BTC = add(x_BTC, self._drop(self.attention(self.attention_norm(x_BTC), rotary, attend)))
        return add(x_BTC, self._drop(self.mlp(self.mlp_norm(x_BTC))))

    def _drop(self, x_BTC: Tensor) -> Tensor:
        return F.dropout(x_BTC, self.dropout) if self.training and self.dropout > 0 else x_BTC
