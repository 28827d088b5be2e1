"""NgramEncoder: a text as the weighted mean of vectors of its tokens and of its pairs of neighbouring tokens.

What learns from a few thousand labelled texts without any pretrained weights: words that say something weigh more than
words that are everywhere, pairs tell "not good" from "good", and there is nothing to get wrong about their order. Pairs
share rows by a hash. Knows no labels and no file format. Shapes: N tokens in one row, B texts, C width.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from smelt.models.batch import Batch
from smelt.models.encoder_architectures import NgramConfig

HASH = (0x9E3779B1, 0x85EBCA6B)  # of the first and the second token of a pair; models on disk depend on it
STD = 0.05


class NgramEncoder(nn.Module):
    """Token ids in, one vector per text out."""

    def __init__(self, config: NgramConfig, dropout: float = 0.0) -> None:
        """`dropout` is of whole tokens and pairs."""
        super().__init__()
        self.config = config
        self.dropout = dropout
        self.embedding = nn.EmbeddingBag(config.vocab_size + config.num_buckets, config.n_embd, mode="sum", sparse=True)
        self.token_weights = nn.Parameter(torch.ones(config.vocab_size + config.num_buckets), requires_grad=False)

    def forward(self, batch: Batch, lengths_B: Tensor) -> Tensor:
        """(B, C): vectors of texts that lie one after the other."""
        ids, texts = self._grams(batch, lengths_B)
        weights = self.token_weights[ids]
        if self.training and self.dropout > 0:
            weights = weights * (torch.rand_like(weights) >= self.dropout)
        sums_B = weights.new_zeros(len(lengths_B)).index_add(0, texts, weights).clamp(min=1e-6)
        scaled = (weights / sums_B[texts]).to(self.embedding.weight.dtype)
        firsts = torch.bincount(texts, minlength=len(lengths_B)).cumsum(0).roll(1)
        firsts[0] = 0
        pooled_BC: Tensor = self.embedding(ids, firsts, per_sample_weights=scaled)
        return pooled_BC

    def _grams(self, batch: Batch, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of the table, text by text, and the number of the text of each."""
        tokens, texts = batch.tokens[0], torch.repeat_interleave(lengths_B)
        if not self.config.num_buckets or len(tokens) < 2:
            return tokens, texts
        are_neighbours = texts[1:] == texts[:-1]
        hashed = tokens[:-1] * HASH[0] + tokens[1:] * HASH[1]
        pairs = self.config.vocab_size + (hashed % self.config.num_buckets)[are_neighbours]
        ids, of = torch.cat((tokens, pairs)), torch.cat((texts, texts[1:][are_neighbours]))
        order = of.argsort(stable=True)
        return ids[order], of[order]

    @torch.no_grad()
    def initialize(self, seed: int) -> None:
        """Normal vectors; every token weighs the same until `weigh`."""
        generator = torch.Generator(self.embedding.weight.device).manual_seed(seed)
        self.embedding.weight.normal_(0.0, STD, generator=generator)
        self.token_weights.fill_(1.0)

    @torch.no_grad()
    def weigh(self, texts: Iterable[Sequence[int]]) -> None:
        """Let tokens and pairs weigh ln((1 + n) / (1 + df)) + 1, their inverse document frequency among n texts."""
        counts = torch.zeros_like(self.token_weights)
        num_texts = 0
        for text in texts:
            tokens_1N = torch.tensor([list(text)], device=counts.device)
            ids, _ = self._grams(Batch(tokens_1N), torch.tensor([len(text)], device=counts.device))
            counts[list(set(ids.tolist()))] += 1
            num_texts += 1
        self.token_weights.copy_(torch.log((1 + num_texts) / (1 + counts)) + 1)
