"""Losses as pure functions of log-probabilities, by name; knows no model internals and no optimizer.

Every loss has one signature: (log-probabilities of the targets, inputs of the same shape or plain numbers) ->
(sum over tokens, metrics). Nothing is averaged: whoever wants a mean divides its weights or advantages. A token
without weight or advantage adds exactly 0, whatever its ratio would be. `on_tokens` joins one to a sequence model,
giving what `step` takes.

In the formulas lp is log p(target) of the model in training, q the `logprobs` that the token was sampled with, A its
`advantages`, r = exp(lp - q), and sg(x) is x without its gradient.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smelt.models.batch import Batch
from smelt.models.decoder import Decoder

Metrics = dict[str, Tensor]
Inputs = Mapping[str, Tensor | float]
TokenLoss = Callable[[Tensor, Inputs], tuple[Tensor, Metrics]]
# The sum over a batch's targets, differentiable; of a Batch, or of what else the model takes.
Loss = Callable[[nn.Module, Any], tuple[Tensor, Metrics]]


def cross_entropy(logprobs: Tensor, inputs: Inputs) -> tuple[Tensor, Metrics]:
    """-sum(w lp); the weight is 1 where no `weights` are given, and may have any sign and size."""
    if "weights" in inputs:
        logprobs = logprobs * inputs["weights"]
    return -logprobs.sum(), {}


def importance_sampling(logprobs: Tensor, inputs: Inputs) -> tuple[Tensor, Metrics]:
    """-sum(r A): the policy gradient, corrected for tokens that an older policy has sampled."""
    ratio, advantages = _ratio(logprobs, inputs), _tensor(inputs, "advantages")
    return -(ratio * advantages).sum(), _ratio_metrics(ratio, advantages)


def ppo(logprobs: Tensor, inputs: Inputs) -> tuple[Tensor, Metrics]:
    """-sum(min(r A, clamp(r) A)) (Schulman et al. 2017, eq. 7); the thresholds bound r itself: 0.8 and 1.2."""
    ratio, advantages = _ratio(logprobs, inputs), _tensor(inputs, "advantages")
    clipped = _clamped(ratio, inputs, 0.8, 1.2)
    objective = torch.minimum(ratio * advantages, clipped * advantages)
    return -objective.sum(), _ratio_metrics(ratio, advantages, clipped)


def cispo(logprobs: Tensor, inputs: Inputs) -> tuple[Tensor, Metrics]:
    """-sum(sg(clamp(r)) lp A) (MiniMax-M1): clipping weakens a token's gradient and never drops it; 0 and 4."""
    ratio, advantages = _ratio(logprobs, inputs), _tensor(inputs, "advantages")
    clipped = _clamped(ratio, inputs, 0.0, 4.0)
    counted = torch.where(advantages != 0, logprobs, 0.0)
    return -(clipped.detach() * counted * advantages).sum(), _ratio_metrics(ratio, advantages, clipped)


def dro(logprobs: Tensor, inputs: Inputs) -> tuple[Tensor, Metrics]:
    """-sum(lp A - beta/2 (lp - q)^2) (Richemond et al. 2024): kept near the sampler by a square; `beta` is 0.05."""
    advantages, sampled = _tensor(inputs, "advantages"), _tensor(inputs, "logprobs")
    drift = logprobs - sampled
    objective = logprobs * advantages - 0.5 * inputs.get("beta", 0.05) * drift.square()
    return -objective.sum(), {"drift": drift.detach().mean()}


def gspo(logprobs: Tensor, inputs: Inputs) -> tuple[Tensor, Metrics]:
    """-sum(min(s A, clamp(s) A)) (Zheng et al. 2025, its token form), where s is one ratio for a whole sequence.

    s = exp(mean over the sequence of (sg(lp) - q)) x exp(lp - sg(lp)), the mean over tokens whose
    `sequence_ratio_mask` is not 0 (all, without one). `segment_ids` tell the sequences apart; without them there is
    one. The thresholds are 0.8 and 1.2.
    """
    advantages = _tensor(inputs, "advantages")
    own = logprobs.detach()
    counts = _tensor(inputs, "sequence_ratio_mask") != 0 if "sequence_ratio_mask" in inputs else advantages != 0
    drift = torch.where(counts, own - inputs["logprobs"], 0.0)
    ratio = torch.exp(_mean_of_segment(drift, counts, inputs) + logprobs - own)
    ratio = torch.where(advantages != 0, ratio, 1.0)
    clipped = _clamped(ratio, inputs, 0.8, 1.2)
    objective = torch.minimum(ratio * advantages, clipped * advantages)
    return -objective.sum(), _ratio_metrics(ratio, advantages, clipped)


def dpo(logprobs: Tensor, inputs: Inputs) -> tuple[Tensor, Metrics]:
    """-log sigmoid(beta sum(w (lp - q))) (Rafailov et al. 2023, eq. 7) of one preference; `beta` is 0.1.

    The weights of the better answer's tokens are above 0, those of the worse one's below; q is what the model gave
    them before it was trained.
    """
    weights = _tensor(inputs, "weights")
    gains = inputs.get("beta", 0.1) * weights * torch.where(weights != 0, logprobs - inputs["logprobs"], 0.0)
    margin = gains.sum()
    own = gains.detach()
    metrics = {
        "chosen_reward": own[weights > 0].sum(),
        "rejected_reward": -own[weights < 0].sum(),
        "margin": margin.detach(),
        "accuracy": (margin.detach() > 0).float(),
    }
    return -F.logsigmoid(margin), metrics


LOSSES: dict[str, TokenLoss] = {
    "cross_entropy": cross_entropy,
    "importance_sampling": importance_sampling,
    "ppo": ppo,
    "cispo": cispo,
    "dro": dro,
    "gspo": gspo,
    "dpo": dpo,
}
# What a loss needs of each token, besides its target; one that is not here needs nothing.
NEEDED = {
    **dict.fromkeys(("importance_sampling", "ppo", "cispo", "dro", "gspo"), ("logprobs", "advantages")),
    "dpo": ("weights", "segment_ids"),
}
REFERRING = ("dpo",)  # those that compare with the model as it was: its `logprobs` need not be given
OPTIONAL = ("weights", "sequence_ratio_mask", "clip_low_threshold", "clip_high_threshold")  # of each token too
SETTINGS = ("clip_low_threshold", "clip_high_threshold", "beta")  # plain numbers


def on_tokens(name: str) -> Loss:
    """The named loss over a batch's targets, as a decoder predicts them."""
    token_loss = LOSSES[name]

    def loss(model: nn.Module, batch: Batch) -> tuple[Tensor, Metrics]:
        assert isinstance(model, Decoder)
        assert batch.targets is not None, "a batch to train on has targets"
        return token_loss(model.target_logprobs(model(batch), batch.targets), batch.loss_inputs)

    return loss


def _tensor(inputs: Inputs, name: str) -> Tensor:
    value = inputs[name]
    assert isinstance(value, Tensor), f"{name} has a value for each token"
    return value


def _ratio(logprobs: Tensor, inputs: Inputs) -> Tensor:
    """r; 1 where there is no advantage: there q may be anything, and 0 x inf is NaN, in the gradient too."""
    return torch.where(_tensor(inputs, "advantages") != 0, logprobs - inputs["logprobs"], 0.0).exp()


def _clamped(ratio: Tensor, inputs: Inputs, low: float, high: float) -> Tensor:
    """Between the thresholds of the inputs (numbers, or one for each token), or else these."""
    lowest, highest = inputs.get("clip_low_threshold", low), inputs.get("clip_high_threshold", high)
    return torch.minimum(torch.maximum(ratio, _like(lowest, ratio)), _like(highest, ratio))


def _like(value: Tensor | float, ratio: Tensor) -> Tensor:
    return value if isinstance(value, Tensor) else torch.full_like(ratio, value)


def _mean_of_segment(values: Tensor, counts: Tensor, inputs: Inputs) -> Tensor:
    """For each token the mean over those of its segment that count."""
    if "segment_ids" not in inputs:
        return values.sum() / counts.sum().clamp(min=1)
    segments = _tensor(inputs, "segment_ids")
    sums = values.new_zeros(int(segments.max()) + 1)
    numbers = sums.index_add(0, segments.flatten(), counts.flatten().to(values.dtype)).clamp(min=1)
    sums = sums.index_add(0, segments.flatten(), values.flatten())
    return (sums / numbers)[segments]


def _ratio_metrics(ratio: Tensor, advantages: Tensor, clipped: Tensor | None = None) -> Metrics:
    """The mean ratio of the tokens that count and, where there is clipping, the share of them that it has changed."""
    counts = advantages != 0
    num_tokens = counts.sum().clamp(min=1)
    metrics = {"ratio": torch.where(counts, ratio.detach(), 0.0).sum() / num_tokens}
    if clipped is not None:
        metrics["clip_fraction"] = ((clipped != ratio) & counts).sum() / num_tokens
    return metrics
