import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from smelt.api import chat_training_types
from smelt.control import loss_requests
from smelt.training.losses import LOSSES, NEEDED

# Three tokens: the policy has become likelier (r = 2), less likely (r = 1/2), and has not moved.
SAMPLED = [-1.0, -1.0, -2.0]
NOW = [-1.0 + math.log(2), -1.0 - math.log(2), -2.0]
ADVANTAGES = [1.0, 1.0, -3.0]


def floats(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def inputs(**changes: Tensor | float) -> dict[str, Tensor | float]:
    return {"logprobs": floats(SAMPLED), "advantages": floats(ADVANTAGES), **changes}


def value_and_gradient(
    name: str, given: dict[str, Tensor | float], now: list[float] = NOW
) -> tuple[float, list[float], dict[str, float]]:
    logprobs = floats(now).requires_grad_()
    total, metrics = LOSSES[name](logprobs, given)
    total.backward()
    assert logprobs.grad is not None
    assert not any(value.requires_grad for value in metrics.values()), "nothing may hold on to the graph"
    return total.item(), logprobs.grad.tolist(), {key: value.item() for key, value in metrics.items()}


def test_cross_entropy_by_hand() -> None:
    total, gradient, _ = value_and_gradient("cross_entropy", {"weights": floats([1.0, 0.0, -0.5])}, [-1.0, -2.0, -3.0])
    assert total == pytest.approx(1.0 - 1.5)
    assert gradient == [-1.0, 0.0, 0.5]


def test_cross_entropy_of_several_targets_at_each_place() -> None:
    logprobs = torch.tensor([[-1.0, -2.0], [-3.0, -4.0]])
    total, _ = LOSSES["cross_entropy"](logprobs, {"weights": torch.tensor([[0.5, 0.5], [1.0, 0.0]])})
    assert total.item() == pytest.approx(0.5 + 1.0 + 3.0)


def test_importance_sampling_by_hand() -> None:
    total, gradient, metrics = value_and_gradient("importance_sampling", inputs())
    assert total == pytest.approx(-(2.0 + 0.5 - 3.0))
    assert gradient == pytest.approx([-2.0, -0.5, 3.0]), "the gradient goes through the ratio"
    assert metrics["ratio"] == pytest.approx((2.0 + 0.5 + 1.0) / 3)


def test_ppo_by_hand() -> None:
    total, gradient, metrics = value_and_gradient("ppo", inputs())
    # Of the gain of the first token only 1.2 counts; the loss of the second counts whole, for min() is pessimistic.
    assert total == pytest.approx(-(1.2 + 0.5 - 3.0))
    assert gradient == pytest.approx([0.0, -0.5, 3.0])
    assert metrics["clip_fraction"] == pytest.approx(2 / 3)


def test_ppo_of_bad_tokens_clips_at_the_other_end() -> None:
    total, gradient, _ = value_and_gradient("ppo", inputs(advantages=floats([-1.0, -1.0, -1.0])))
    assert total == pytest.approx(2.0 + 0.8 + 1.0)
    assert gradient == pytest.approx([2.0, 0.0, 1.0])


def test_thresholds_may_be_numbers_or_of_each_token() -> None:
    wide = inputs(clip_low_threshold=0.1, clip_high_threshold=9.0)
    assert value_and_gradient("ppo", wide)[:2] == value_and_gradient("importance_sampling", inputs())[:2]
    each = inputs(clip_high_threshold=floats([1.5, 1.2, 1.2]))
    assert value_and_gradient("ppo", each)[0] == pytest.approx(-(1.5 + 0.5 - 3.0))


def test_cispo_by_hand() -> None:
    total, gradient, metrics = value_and_gradient("cispo", inputs(clip_high_threshold=1.5))
    assert total == pytest.approx(-(1.5 * NOW[0] + 0.5 * NOW[1] - 3.0 * NOW[2]))
    assert gradient == pytest.approx([-1.5, -0.5, 3.0]), "a clipped token still has a gradient"
    assert metrics["clip_fraction"] == pytest.approx(1 / 3)
    assert value_and_gradient("cispo", inputs())[2]["clip_fraction"] == 0, "0 and 4 are the defaults"


def test_dro_by_hand() -> None:
    total, gradient, _ = value_and_gradient("dro", inputs(beta=0.5))
    square = math.log(2) ** 2
    assert total == pytest.approx(-(NOW[0] - 0.25 * square + NOW[1] - 0.25 * square - 3.0 * NOW[2]))
    assert gradient == pytest.approx([-1 + 0.5 * math.log(2), -1 - 0.5 * math.log(2), 3.0])


def test_gspo_by_hand() -> None:
    # Over the two tokens of the mask the mean drift is 0, so the ratio of the whole sequence is 1.
    mask = floats([1.0, 1.0, 0.0])
    total, gradient, _ = value_and_gradient("gspo", inputs(sequence_ratio_mask=mask))
    assert total == pytest.approx(-(1.0 + 1.0 - 3.0))
    assert gradient == pytest.approx([-1.0, -1.0, 3.0])
    # Over the first alone it is 2, which is clipped where that makes the objective smaller.
    total, gradient, _ = value_and_gradient("gspo", inputs(sequence_ratio_mask=floats([1.0, 0.0, 0.0])))
    assert total == pytest.approx(-(1.2 + 1.2 - 6.0))
    assert gradient == pytest.approx([0.0, 0.0, 6.0])


def test_gspo_of_packed_sequences_is_the_sum_of_each_alone() -> None:
    twice = {
        "logprobs": floats(SAMPLED + [-1.0, -1.0]),
        "advantages": floats(ADVANTAGES + [2.0, 2.0]),
        "segment_ids": torch.tensor([0, 0, 0, 1, 1]),
    }
    other = {"logprobs": floats([-1.0, -1.0]), "advantages": floats([2.0, 2.0])}
    packed = value_and_gradient("gspo", twice, [*NOW, -0.9, -1.3])
    first, second = value_and_gradient("gspo", inputs()), value_and_gradient("gspo", other, [-0.9, -1.3])
    assert packed[0] == pytest.approx(first[0] + second[0])
    assert packed[1] == pytest.approx(first[1] + second[1])


@pytest.mark.parametrize("name", [name for name in LOSSES if name not in ("cross_entropy", "dro", "dpo")])
def test_a_token_without_advantage_adds_nothing_whatever_its_ratio(name: str) -> None:
    given = {"logprobs": floats([-1000.0, -1.0, -math.inf]), "advantages": floats([0.0, 1.0, 0.0])}
    total, gradient, _ = value_and_gradient(name, given, [0.0, -1.0, -1.0])
    alone, own, _ = value_and_gradient(name, {"logprobs": floats([-1.0]), "advantages": floats([1.0])}, [-1.0])
    assert total == pytest.approx(alone)
    assert gradient == pytest.approx([0.0, own[0], 0.0])


@pytest.mark.parametrize("name", ["cross_entropy", "importance_sampling", "dro"])
def test_gradients_agree_with_differences(name: str) -> None:
    given = inputs(weights=floats([0.3, -1.0, 2.0]))
    assert torch.autograd.gradcheck(closed(name, given), floats(NOW).requires_grad_())


@pytest.mark.parametrize("name", ["ppo", "gspo"])
def test_gradients_of_clipped_losses_agree_with_differences_between_the_corners(name: str) -> None:
    # One token per sequence: then the whole sequence's ratio, which has no gradient of its own, is 1 times the token's.
    given = {"logprobs": floats([-1.0]), "advantages": floats([1.5])}
    if name == "ppo":
        assert torch.autograd.gradcheck(closed(name, given), floats([-1.1]).requires_grad_())
    assert value_and_gradient(name, given, [-1.1])[1] == pytest.approx([-1.5 * math.exp(-0.1)])


def closed(name: str, given: dict[str, Tensor | float]) -> Callable[[Tensor], Tensor]:
    return lambda logprobs: LOSSES[name](logprobs, given)[0]


def test_dpo_by_hand() -> None:
    # Two tokens of the better answer, one of the worse: by 0.5 likelier than they were, and by 0.25.
    given = {"weights": floats([1.0, 1.0, -1.0]), "logprobs": floats([-1.0, -2.0, -3.0]), "beta": 0.4}
    total, gradient, metrics = value_and_gradient("dpo", given, [-0.7, -1.8, -2.75])
    margin = 0.4 * (0.3 + 0.2 - 0.25)
    assert total == pytest.approx(math.log(1 + math.exp(-margin)))
    share = 0.4 / (1 + math.exp(margin))
    assert gradient == pytest.approx([-share, -share, share])
    assert metrics == pytest.approx({"chosen_reward": 0.2, "rejected_reward": 0.1, "margin": margin, "accuracy": 1.0})


def test_dpo_s_gradient_is_that_of_its_differences() -> None:
    given = {"weights": floats([1.0, 0.0, -1.0]), "logprobs": floats([SAMPLED[0], -math.inf, SAMPLED[2]])}
    logprobs = floats(NOW).requires_grad_()
    assert torch.autograd.gradcheck(lambda now: LOSSES["dpo"](now, given)[0], (logprobs,))


def test_the_losses_that_are_told_of_are_those_that_there_are() -> None:
    assert loss_requests.LOSSES.keys() == LOSSES.keys()


def test_those_who_speak_plain_http_are_asked_for_what_losses_need() -> None:
    asked = {name: inputs[1:] for name, inputs in chat_training_types.NEEDED.items()}
    assert asked == {name: needed for name, needed in NEEDED.items() if name != chat_training_types.PREFERENCES}
    assert {inputs[0] for inputs in chat_training_types.NEEDED.values()} == {"target_tokens"}
