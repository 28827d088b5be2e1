"""Encoder: a transformer in which every token sees its whole text; DistilBERT, BERT and RoBERTa are settings of it.

Norms follow the branches, as in these models. Knows no head, no labels and no file format. Shapes: one row of N
tokens, texts one after the other; C width, H heads, D width of a head.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smelt.models.batch import Batch
from smelt.models.encoder_architectures import EncoderConfig
from smelt.models.layers import Attend
from smelt.models.linear import Linear


class EncoderAttention(nn.Module):
    """Multi-head attention; who sees whom is `attend`'s business."""

    def __init__(self, config: EncoderConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.num_heads, self.head_dim = config.n_head, config.head_dim
        self.qkv = Linear(config.n_embd, 3 * config.n_embd)
        self.out = Linear(config.n_embd, config.n_embd)

    def forward(self, x_1NC: Tensor, attend: Attend) -> Tensor:
        """(1, N, C) -> (1, N, C)."""
        packed = self.qkv(x_1NC).view(1, x_1NC.shape[1], 3, self.num_heads, self.head_dim)
        mixed_1NHD = attend(self.layer, *packed.unbind(2))
        return self.out(mixed_1NHD.flatten(2))


class EncoderMLP(nn.Module):
    """Two matrices with the activation of the config between them."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.activation = config.activation
        self.up = Linear(config.n_embd, config.n_inner)
        self.down = Linear(config.n_inner, config.n_embd)

    def forward(self, x_1NC: Tensor) -> Tensor:
        """(1, N, C) -> (1, N, C)."""
        hidden = self.up(x_1NC)
        if self.activation == "relu":
            return self.down(F.relu(hidden))
        return self.down(F.gelu(hidden, approximate="tanh" if self.activation == "gelu_tanh" else "none"))


class EncoderBlock(nn.Module):
    """Post-norm residual block: norm(x + attention(x)), then norm(x + mlp(x))."""

    def __init__(self, config: EncoderConfig, layer: int, dropout: float) -> None:
        super().__init__()
        self.attention = EncoderAttention(config, layer)
        self.attention_norm = nn.LayerNorm(config.n_embd, eps=config.norm_eps)
        self.mlp = EncoderMLP(config)
        self.mlp_norm = nn.LayerNorm(config.n_embd, eps=config.norm_eps)
        self.dropout = dropout

    def forward(self, x_1NC: Tensor, attend: Attend) -> Tensor:
        """(1, N, C) -> (1, N, C)."""
        x_1NC = self.attention_norm(x_1NC + F.dropout(self.attention(x_1NC, attend), self.dropout, self.training))
        return self.mlp_norm(x_1NC + F.dropout(self.mlp(x_1NC), self.dropout, self.training))


class Encoder(nn.Module):
    """Token ids in, hidden states out."""

    def __init__(self, config: EncoderConfig, dropout: float = 0.0) -> None:
        super().__init__()
        self.config = config
        self.dropout = dropout
        self.embedding = nn.Embedding(config.vocab_size, config.n_embd, sparse=True)  # nothing else reads it
        self.positions = nn.Embedding(config.block_size + config.first_position, config.n_embd)
        if config.num_token_types:
            self.token_types = nn.Embedding(config.num_token_types, config.n_embd)
        self.norm = nn.LayerNorm(config.n_embd, eps=config.norm_eps)
        self.blocks = nn.ModuleList(EncoderBlock(config, layer, dropout) for layer in range(config.n_layer))

    def forward(self, batch: Batch, attend: Attend) -> Tensor:
        """Hidden states (1, N, C) of texts in one row, which have positions."""
        assert batch.positions is not None, "texts lie one after the other, so each begins at position 0"
        x_1NC = self.embedding(batch.tokens) + self.positions(batch.positions + self.config.first_position)
        if self.config.num_token_types:
            x_1NC = x_1NC + self.token_types.weight[0]
        x_1NC = F.dropout(self.norm(x_1NC), self.dropout, self.training)
        for block in self.blocks:
            x_1NC = block(x_1NC, attend)
        return x_1NC

    @torch.no_grad()
    def initialize(self, seed: int) -> None:
        """Normal with std 0.5/sqrt(width), which is BERT's 0.02 at its width; norms 1, biases 0."""
        generator = torch.Generator(self.embedding.weight.device).manual_seed(seed)
        std = 0.5 / math.sqrt(self.config.n_embd)
        for name, parameter in self.named_parameters():
            if parameter.dim() < 2:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            else:
                parameter.normal_(0.0, std, generator=generator)
