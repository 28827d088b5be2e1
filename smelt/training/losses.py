"""Losses as pure functions of log-probabilities, by name; knows no model internals and no optimizer.

Every loss has one signature: (logprobs_BT of the targets, the batch's loss inputs) -> (sum over tokens, metrics).
`on_tokens` joins one to a sequence model, giving what `step` takes.
"""

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from smelt.models.batch import Batch
from smelt.models.decoder import Decoder

Metrics = dict[str, Tensor]
TokenLoss = Callable[[Tensor, Mapping[str, Tensor]], tuple[Tensor, Metrics]]
Loss = Callable[[nn.Module, Batch], tuple[Tensor, Metrics]]  # the sum over a batch's targets, differentiable


def cross_entropy(logprobs_BT: Tensor, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Metrics]:
    """-sum(w_t log p(target_t)); the weight is 1 where no `weights` are given."""
    if "weights" in inputs:
        logprobs_BT = logprobs_BT * inputs["weights"]
    return -logprobs_BT.sum(), {}


LOSSES: dict[str, TokenLoss] = {"cross_entropy": cross_entropy}


def on_tokens(name: str) -> Loss:
    """The named loss over a batch's targets, as a decoder predicts them."""
    token_loss = LOSSES[name]

    def loss(model: nn.Module, batch: Batch) -> tuple[Tensor, Metrics]:
        assert isinstance(model, Decoder)
        assert batch.targets is not None, "a batch to train on has targets"
        return token_loss(model.target_logprobs(model(batch), batch.targets), batch.loss_inputs)

    return loss
