"""Decoder: one configurable causal transformer for the GPT-2 and the Llama/Qwen families.

The only forward pass: pretraining, fine-tuning and generation all call it. Knows no tokenizer, no loss
and no file format (`weights` maps it to Hugging Face folders).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from smelt.configs import DecoderConfig
from smelt.models.batch import NO_TARGET, Batch
from smelt.models.layers import Attend, Block, attend_within, make_norm, rotary_tables
from smelt.models.linear import Linear, product
from smelt.models.rowwise import Embedding, add


class Decoder(nn.Module):
    """Token ids in, hidden states out; `logits` and `target_logprobs` turn hidden states into answers."""

    def __init__(self, config: DecoderConfig, dropout: float = 0.0) -> None:
        super().__init__()
        self.config = config
        self.dropout = dropout
        self.gradient_checkpointing = False
        self.embedding = Embedding(config.vocab_size, config.n_embd)
        if config.position == "learned":
            self.positions = Embedding(config.block_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config, layer, dropout) for layer in range(config.n_layer))
        self.norm = make_norm(config, config.n_embd)
        self.head: nn.Module | None = None  # tied: the embedding again
        if not config.tied:
            self.head = Linear(config.n_embd, config.vocab_size, bias=False)

    def forward(self, batch: Batch, attend: Attend | None = None) -> Tensor:
        """Hidden states (B, T, C) after the last norm. `attend` None: causal within the batch's rows."""
        if attend is None:
            attend = attend_within(batch, self.config, self.dropout if self.training else 0.0)
        x_BTC = self.embedding(batch.tokens)
        rotary = None
        if self.config.position == "learned":
            x_BTC = add(x_BTC, self._position_vectors(batch))
        else:
            rotary = self._rotary_tables(batch, x_BTC.dtype)
        x_BTC = F.dropout(x_BTC, self.dropout, self.training)
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x_BTC = checkpoint(block, x_BTC, rotary, attend, use_reentrant=False)
            else:
                x_BTC = block(x_BTC, rotary, attend)
        hidden: Tensor = self.norm(x_BTC)
        return hidden

    def _position_vectors(self, batch: Batch) -> Tensor:
        if batch.positions is None:
            return self.positions.weight[: batch.tokens.shape[1]]
        vectors: Tensor = self.positions(batch.positions)
        return vectors

    def _rotary_tables(self, batch: Batch, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        positions = batch.positions
        if positions is None:
            positions = torch.arange(batch.tokens.shape[1], device=batch.tokens.device)[None]
        return rotary_tables(self.config, positions, dtype)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., C) -> (..., V) in the weights' dtype."""
        if self.head is None:
            return product(hidden, self.embedding.weight)
        return self.head(hidden)

    def target_logprobs(self, hidden_BTC: Tensor, targets_BT: Tensor) -> Tensor:
        """log p(target) in fp32, (B, T); 0 where the target is NO_TARGET."""
        logits = self.logits(hidden_BTC).float()
        flat = F.cross_entropy(logits.flatten(0, -2), targets_BT.flatten(), ignore_index=NO_TARGET, reduction="none")
        return -flat.view_as(targets_BT)

    @torch.no_grad()
    def initialize(self, seed: int) -> None:
        """Normal with std 0.5/sqrt(width), residual projections zero, so that every block begins as the identity.

        At GPT-2's width of 768 the std is its 0.02; narrow models learn much faster from the wider one
        (docs/experiments.md).
        """
        generator = torch.Generator(self.embedding.weight.device).manual_seed(seed)
        std = 0.5 / math.sqrt(self.config.n_embd)
        for name, parameter in self.named_parameters():
            if parameter.dim() < 2:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            elif name.endswith(("attention.out.weight", "mlp.down.weight")):
                parameter.zero_()
            else:
                parameter.normal_(0.0, std, generator=generator)
