"""Classifier: an encoder or a decoder with a head that says which label each text of a batch has.

An encoder is asked at a text's first token and a decoder at its last, as in transformers, whose heads these are. Our
own encoder of n-grams gives one vector per text.
Knows no tokenizer, no loss and no file format. Shapes: one row of N tokens, B texts, C width, L labels.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smelt.configs import DecoderConfig
from smelt.models.batch import NO_TARGET, Batch
from smelt.models.decoder import Decoder
from smelt.models.encoder import Encoder
from smelt.models.encoder_architectures import ENCODERS, ClassifierShape, EncoderConfig, NgramConfig
from smelt.models.layers import Attend
from smelt.models.linear import Linear
from smelt.models.ngram_encoder import NgramEncoder
from smelt.models.packed_attention import attend_within_texts


class Classifier(nn.Module):
    """A batch of texts in, logits of the labels out."""

    def __init__(self, config: ClassifierShape, dropout: float = 0.0, head_dropout: float = 0.0) -> None:
        super().__init__()
        self.config = config
        self.dropout = dropout
        self.head_dropout = head_dropout
        shape, num_labels = config.backbone, len(config.labels)
        self.dense: Linear | None = None
        self.backbone: Encoder | NgramEncoder | Decoder
        if isinstance(shape, EncoderConfig):
            self.backbone = Encoder(shape, dropout)
            self.dense = Linear(shape.n_embd, shape.n_embd)
        elif isinstance(shape, NgramConfig):
            self.backbone = NgramEncoder(shape, dropout)
        else:
            self.backbone = Decoder(shape.replace(tied=True), dropout)
        self.out = Linear(shape.n_embd, num_labels, bias=not isinstance(shape, DecoderConfig))

    def forward(self, batch: Batch) -> Tensor:
        """Logits (B, L) of the texts, in their order in the row."""
        assert batch.segment_ids is not None, "texts are told apart by their segments"
        x_BC = self._pooled(batch, torch.bincount(batch.segment_ids[0]))
        return self.out(F.dropout(x_BC, self.head_dropout, self.training))

    def _pooled(self, batch: Batch, lengths_B: Tensor) -> Tensor:
        """(B, C): what the head is given of each text."""
        ends_B = lengths_B.cumsum(0)
        match self.backbone:
            case NgramEncoder():
                return self.backbone(batch, lengths_B)
            case Decoder():
                return self.backbone(batch, self._attend(lengths_B))[0, ends_B - 1]
            case Encoder():
                return self._densely(self.backbone(batch, self._attend(lengths_B))[0, ends_B - lengths_B])

    def _densely(self, x_BC: Tensor) -> Tensor:
        """What encoders' heads do before the last matrix."""
        assert self.dense is not None, "encoders have it"
        assert isinstance(self.config.backbone, EncoderConfig)
        x_BC = self.dense(x_BC)
        is_relu = ENCODERS[self.config.backbone.architecture].head_activation == "relu"
        return F.relu(x_BC) if is_relu else torch.tanh(x_BC)

    def _attend(self, lengths_B: Tensor) -> Attend:
        lengths, dropout = lengths_B.tolist(), self.dropout if self.training else 0.0
        if isinstance(self.backbone, Decoder):
            window = self.backbone.config.sliding_window
            return attend_within_texts(lengths, lengths_B.device, causal=True, window=window, dropout=dropout)
        return attend_within_texts(lengths, lengths_B.device, dropout=dropout)

    @torch.no_grad()
    def initialize(self, seed: int) -> None:
        """Fresh weights for all of it."""
        self.backbone.initialize(seed)
        self.initialize_head(seed)

    @torch.no_grad()
    def initialize_head(self, seed: int) -> None:
        """Fresh weights for the head, as a model that was trained for something else has none."""
        generator = torch.Generator(self.out.weight.device).manual_seed(seed + 1)
        std = 0.5 / math.sqrt(self.config.backbone.n_embd)
        for layer in [self.out] if self.dense is None else [self.out, self.dense]:
            layer.weight.normal_(0.0, std, generator=generator)
            if layer.bias is not None:
                layer.bias.zero_()


def pack_texts(texts: Sequence[Sequence[int]], labels: Sequence[int] | None = None) -> Batch:
    """Token ids of texts as one row; the target of a text stands at its first token. None may be empty."""
    lengths = torch.tensor([len(text) for text in texts])
    firsts = lengths.cumsum(0) - lengths
    segments_N = torch.repeat_interleave(lengths)
    tokens_N = torch.tensor([token for text in texts for token in text])
    targets = None
    if labels is not None:
        targets = torch.full_like(tokens_N, NO_TARGET)
        targets[firsts] = torch.tensor(labels)
    positions_N = torch.arange(len(tokens_N)) - firsts[segments_N]
    return Batch(
        tokens=tokens_N[None],
        targets=None if targets is None else targets[None],
        positions=positions_N[None],
        segment_ids=segments_N[None],
    )


def labels_of(batch: Batch) -> Tensor:
    """(B,): the labels of a batch's texts."""
    assert batch.targets is not None, "a batch to train on has labels"
    return batch.targets[batch.targets != NO_TARGET]
