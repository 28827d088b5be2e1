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


def _check(request: ForwardBackward, config: DecoderConfig | None) -> None:
    if request.loss_name in UNSUPPORTED_LOSSES:
        raise InvalidInput(UNSUPPORTED_LOSSES[request.loss_name], "loss_fn")
    if not request.data:
        raise InvalidInput("there are no data to train on", "data")
    if config is not None:
        for number, datum in enumerate(request.data):
            _check_datum(datum, f"datum {number}", config)


def _check_datum(datum: Datum, place: str, config: DecoderConfig) -> None:
    if len(datum.tokens) > config.block_size:
        raise InvalidInput(
            f"{place} has {len(datum.tokens)} tokens, and the model's context window is {config.block_size}; split it"
        )
    targets = datum.inputs.get("target_tokens")
    for what, tokens in (("model_input", datum.tokens), ("target_tokens", targets)):
        if tokens is not None and not bool(np.all((tokens >= 0) & (tokens < config.vocab_size))):
            raise InvalidInput(
                f"{place}: {what} has tokens that the model does not; it has 0 to {config.vocab_size - 1}", what
            )
