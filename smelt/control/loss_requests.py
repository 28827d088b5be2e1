"""Requests for a loss, understood as far as counts and bounds go; computes nothing and knows no loss's formula.

Data that no model could take is told here, before a worker holds it. What a loss wants to know of each token is the
worker's to check, which has the losses.
"""

import hashlib
from dataclasses import dataclass

import numpy as np

from smelt.configs import DecoderConfig
from smelt.errors import InvalidInput, SmeltError
from smelt.transport.tinker_wire import ForwardBackward, decode_forward_backward, decode_place
from smelt.types import Datum

# What each loss is for, as those are told who ask which there are.
LOSSES = {
    "cross_entropy": "supervised learning: negative log-likelihood of the assistant's tokens",
    "importance_sampling": "policy gradient, corrected for tokens that an older policy has sampled",
    "ppo": "policy gradient whose ratios are clipped (Schulman et al. 2017)",
    "cispo": "policy gradient whose clipped ratios only weigh (MiniMax-M1)",
    "dro": "policy gradient kept near the sampler by a square (Richemond et al. 2024)",
    "gspo": "policy gradient with one clipped ratio for a sequence (Zheng et al. 2025)",
    "dpo": "preferences between two answers, against the base model (Rafailov et al. 2023)",
}
UNSUPPORTED_LOSSES = {
    "custom": (
        "this server takes no loss functions of its clients: use forward_backward_custom, which computes them there"
    ),
    "stable_reinforce": (
        "stable_reinforce is not published, so it is not supported: use importance_sampling, ppo, cispo or gspo"
    ),
}


@dataclass(frozen=True, slots=True)
class LossPlace:
    """Where a request for a loss belongs, and a digest of what it means, the same whenever it is sent."""

    model_id: str
    seq: int | None
    meant: bytes


def place_of(body: bytes) -> LossPlace:
    """Where a request belongs. InvalidInput where that cannot be read."""
    model_id, seq, meant = decode_place(body)
    if seq < 0:
        raise InvalidInput(f"seq_id must not be negative, and it is {seq}", "seq_id")
    return LossPlace(model_id, seq or None, hashlib.sha256(meant).digest())


def fault_of(body: bytes, config: DecoderConfig | None) -> SmeltError | None:
    """Why no model of that shape could do what is asked; None where it may."""
    try:
        _check(decode_forward_backward(body), config)
    except InvalidInput as fault:
        return fault
    return None


def check_loss(name: str) -> None:
    """InvalidInput for a loss that we do not have."""
    if name not in LOSSES:
        reason = UNSUPPORTED_LOSSES.get(name, f"unknown loss function {name[:60]!r}; known: {', '.join(LOSSES)}")
        raise InvalidInput(reason, "loss_fn")


def _check(request: ForwardBackward, config: DecoderConfig | None) -> None:
    if request.loss_name in UNSUPPORTED_LOSSES:
        raise InvalidInput(UNSUPPORTED_LOSSES[request.loss_name], "loss_fn")
    if not request.data:
        raise InvalidInput("there are no data to train on", "data")
    if config is not None:
        for number, datum in enumerate(request.data):
            _check_datum(datum, f"datum {number}", config)


def _check_datum(datum: Datum, place: str, config: DecoderConfig) -> None:
    if max(datum.lengths) > config.block_size:
        raise InvalidInput(
            f"{place} has {max(datum.lengths)} tokens, and the model's context window is {config.block_size}; split it"
        )
    targets = datum.inputs.get("target_tokens")
    for what, tokens in (("model_input", datum.tokens), ("target_tokens", targets)):
        if tokens is not None and not bool(np.all((tokens >= 0) & (tokens < config.vocab_size))):
            raise InvalidInput(
                f"{place}: {what} has tokens that the model does not; it has 0 to {config.vocab_size - 1}", what
            )
