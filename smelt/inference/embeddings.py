"""Texts as vectors: the mean of a model's last hidden states over their tokens; knows no text and no requests.

The work comes in slices of bounded size, so that whoever streams answers beside it does not notice: short inputs are
packed into one row, a long one goes through the model piece by piece and keeps its keys and values meanwhile.
"""

from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from smelt.configs import DecoderConfig
from smelt.errors import InvalidInput
from smelt.models.batch import Batch
from smelt.models.decoder import Decoder

SLICE_TOKENS = 256

# The vectors (C,) in fp32 that one slice has finished, each with the number of its input.
Slice = list[tuple[int, Tensor]]


def check_inputs(inputs: Items[Items[int]], config: DecoderConfig) -> None:
    """InvalidInput for an input without tokens, with unknown ones, or with more than the model's context."""
    for number, tokens in enumerate(inputs):
        if not tokens:
            raise InvalidInput(f"input {number} has no tokens, so there is nothing to take the mean of", "input")
        if len(tokens) > config.block_size:
            raise InvalidInput(
                f"input {number} has {len(tokens)} tokens, but the model's context is {config.block_size}; "
                f"shorten it, or split it and average",
                "input",
            )
        if not 0 <= min(tokens) <= max(tokens) < config.vocab_size:
            raise InvalidInput(f"input {number} has token ids outside of 0..{config.vocab_size - 1}", "input")


def embed_in_slices(model: Decoder, inputs: Items[Items[int]], slice_tokens: int = SLICE_TOKENS) -> Iterator[Slice]:
    """One slice of work at each step: a forward pass over at most `slice_tokens`."""
    short = [number for number, tokens in enumerate(inputs) if len(tokens) <= slice_tokens]
    for packed in _packed(inputs, sorted(short, key=lambda number: len(inputs[number])), slice_tokens):
        yield _embed_packed(model, inputs, packed)
    for number, tokens in enumerate(inputs):
        if len(tokens) > slice_tokens:
            yield from _embed_long(model, number, tokens, slice_tokens)


def join_vectors(slices: Iterable[Slice], num_inputs: int, width: int) -> NDArray[np.float32]:
    """(N, C): the vectors of all slices in the order of the inputs."""
    vectors_NC = np.empty((num_inputs, width), np.float32)
    for finished in slices:
        for number, vector in finished:
            vectors_NC[number] = vector.cpu().numpy()
    return vectors_NC


def _packed(inputs: Items[Items[int]], numbers: Items[int], slice_tokens: int) -> Iterator[list[int]]:
    """Numbers of inputs that fit into one slice together."""
    group: list[int] = []
    num_tokens = 0
    for number in numbers:
        if group and num_tokens + len(inputs[number]) > slice_tokens:
            yield group
            group, num_tokens = [], 0
        group.append(number)
        num_tokens += len(inputs[number])
    if group:
        yield group


@torch.inference_mode()
def _embed_packed(model: Decoder, inputs: Items[Items[int]], numbers: list[int]) -> Slice:
    device = model.embedding.weight.device
    lengths = [len(inputs[number]) for number in numbers]
    tokens_T = torch.tensor([token for number in numbers for token in inputs[number]], device=device)
    positions_T = torch.cat([torch.arange(length, device=device) for length in lengths])
    segments_T = torch.repeat_interleave(torch.tensor(lengths, device=device))
    hidden_BTC = model(Batch(tokens_T[None], positions=positions_T[None], segment_ids=segments_T[None]))
    means = [part.float().mean(dim=0) for part in hidden_BTC[0].split(lengths)]
    return list(zip(numbers, means, strict=True))


@torch.inference_mode()
def _embed_long(model: Decoder, number: int, tokens: Items[int], slice_tokens: int) -> Iterator[Slice]:
    device = model.embedding.weight.device
    remembered = _Remembered(model.config)
    sum_C = torch.zeros(model.config.n_embd, device=device)
    for start in range(0, len(tokens), slice_tokens):
        tokens_T = torch.tensor(tokens[start : start + slice_tokens], device=device)
        positions_T = torch.arange(start, start + len(tokens_T), device=device)
        hidden_BTC = model(Batch(tokens_T[None], positions=positions_T[None]), remembered.attend)
        sum_C += hidden_BTC[0].float().sum(dim=0)
        is_last = start + slice_tokens >= len(tokens)
        yield [(number, sum_C / len(tokens))] if is_last else []


@dataclass(slots=True)
class _Remembered:
    """Keys and values of one input so far, by layer."""

    config: DecoderConfig
    layers: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def attend(self, layer: int, q_BTHD: Tensor, k_BTGD: Tensor, v_BTGD: Tensor) -> Tensor:
        """Attention of the new tokens to themselves and all before them."""
        if layer in self.layers:
            past_k, past_v = self.layers[layer]
            k_BTGD, v_BTGD = torch.cat((past_k, k_BTGD), dim=1), torch.cat((past_v, v_BTGD), dim=1)
        self.layers[layer] = k_BTGD, v_BTGD
        num_new, num_keys = q_BTHD.shape[1], k_BTGD.shape[1]
        queries = torch.arange(num_keys - num_new, num_keys, device=q_BTHD.device)[:, None]
        keys = torch.arange(num_keys, device=q_BTHD.device)
        window = self.config.sliding_window or num_keys
        visible = (keys <= queries) & (keys > queries - window)
        grouped = self.config.n_kv_head != self.config.n_head
        q_BHTD, k_BGTD, v_BGTD = (x.transpose(1, 2) for x in (q_BTHD, k_BTGD, v_BTGD))
        return F.scaled_dot_product_attention(q_BHTD, k_BGTD, v_BGTD, visible, enable_gqa=grouped).transpose(1, 2)
