"""A small model, and data for it, for tests of training by request."""

from typing import Any

import numpy as np
import torch

from smelt.configs import PRESETS, DecoderConfig
from smelt.models.decoder import Decoder
from smelt.types import Datum

VOCAB = 61


def make_model(dtype: torch.dtype = torch.float32, **shape: Any) -> Decoder:
    """One with random weights in every place."""
    torch.manual_seed(0)
    given = {"vocab_size": VOCAB, "block_size": 256, "n_layer": 2, "n_head": 4, "n_kv_head": 2, "n_embd": 32, **shape}
    model = Decoder(DecoderConfig(**{**PRESETS["nano-llama"], **given}))
    model.initialize(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.to(dtype).eval()


def datum_of(num_tokens: int, seed: int = 0, **inputs: Any) -> Datum:
    """Random tokens with a target and a weight at each place."""
    draw = np.random.default_rng(seed)
    tokens = draw.integers(0, VOCAB, num_tokens + 1)
    weights = draw.uniform(-1, 1, num_tokens).astype(np.float32)
    given = {"target_tokens": tokens[1:].astype(np.int64), "weights": weights, **inputs}
    return Datum(tokens[:-1].astype(np.int32), given)


def rl_datum(num_tokens: int, seed: int = 0) -> Datum:
    """The same as if it had been sampled, with advantages."""
    draw = np.random.default_rng(1000 + seed)
    sampled = -draw.uniform(2, 6, num_tokens).astype(np.float32)
    return datum_of(num_tokens, seed, logprobs=sampled, advantages=draw.normal(size=num_tokens).astype(np.float32))
