"""Losses over examples: what the assistant said (supervised), and which of two answers is better (DPO).

Both have the signature of `Loss` for an ExampleBatch. Their metrics are sums over its targets. Logits exist for
learned positions only, HEAD_ROWS at a time. Shapes: N learned positions, P preferences, C width, V token ids.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from smelt.models.decoder import Decoder
from smelt.models.packed_attention import attend_within_texts
from smelt.training.example_batches import ExampleBatch
from smelt.training.losses import Metrics

HEAD_ROWS = 1024  # whose logits are in memory at once


def supervised(model: nn.Module, batch: ExampleBatch) -> tuple[Tensor, Metrics]:
    """-sum(w log p(target)) over the learned tokens; accuracy counts those that were the likeliest."""
    logprobs_N, is_right_N = predict(model, batch)
    return -(batch.weights * logprobs_N).sum(), {"accuracy": is_right_N.sum()}


def preference(model: nn.Module, batch: ExampleBatch, beta: float) -> tuple[Tensor, Metrics]:
    """-sum(log sigmoid(beta ((c - c0) - (r - r0)))) (Rafailov et al. 2023, eq. 7), a term for each preference.

    c and r are log p of the chosen and the rejected answer, c0 and r0 by the model that the run began with. Accuracy
    counts the preferences whose difference, the margin, is above 0.
    """
    assert batch.references is not None, "preferences come with the first model's log-probabilities"
    gains = answer_logprobs(model, batch) - batch.references  # (P, 2)
    margins = beta * (gains[:, 0] - gains[:, 1])
    metrics = {"accuracy": (margins > 0).sum(), "margin": margins.detach().sum()}
    return -F.logsigmoid(margins).sum(), metrics


def answer_logprobs(model: nn.Module, batch: ExampleBatch) -> Tensor:
    """log p of both answers of each preference, (P, 2)."""
    logprobs_N, _ = predict(model, batch)
    sums = logprobs_N.new_zeros(len(batch.lengths)).index_add(0, batch.sequence_ids, batch.weights * logprobs_N)
    return sums.view(-1, 2)


def predict(model: nn.Module, batch: ExampleBatch) -> tuple[Tensor, Tensor]:
    """(N,) each: log p of the targets in fp32, and whether they were the likeliest."""
    assert isinstance(model, Decoder)
    attend = attend_within_texts(
        batch.lengths,
        batch.row.tokens.device,
        causal=True,
        window=model.config.sliding_window,
        dropout=model.dropout if model.training else 0.0,
    )
    hidden_NC = model(batch.row, attend)[0].index_select(0, batch.counted)
    parts = list(zip(torch.split(hidden_NC, HEAD_ROWS), torch.split(batch.targets, HEAD_ROWS), strict=True))
    look = _look_up
    if len(parts) > 1 and torch.is_grad_enabled():
        look = partial(checkpoint, _look_up, use_reentrant=False)
    found = [look(model, hidden, targets) for hidden, targets in parts]
    return torch.cat([logprobs for logprobs, _ in found]), torch.cat([is_right for _, is_right in found])


def _look_up(model: Decoder, hidden_NC: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    logits_NV = model.logits(hidden_NC).float()
    logprobs_N = -F.cross_entropy(logits_NV, targets_N, reduction="none")
    return logprobs_N, logits_NV.detach().argmax(dim=1) == targets_N
