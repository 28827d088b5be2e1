import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from smelt.errors import InvalidInput
from smelt.inference.sampler import check_params, rate, sample
from smelt.inference.sequence import Sequence
from smelt.types import SamplingParams

LOGITS = torch.tensor([math.log(p) for p in (0.1, 0.4, 0.05, 0.3, 0.15)])


def fixed(uniform: float, **settings: Any) -> Sequence:
    """A sequence whose next draw is known."""
    sequence = Sequence([0], SamplingParams(**settings))
    sequence._uniform = uniform
    return sequence


def evenly(num_draws: int, **settings: Any) -> list[Sequence]:
    """Sequences whose draws run evenly through [0, 1)."""
    return [fixed((i + 0.5) / num_draws, **settings) for i in range(num_draws)]


def shares(logits: Tensor, num_draws: int = 4000, **settings: Any) -> list[float]:
    """How often each token is drawn."""
    drawn = sample(logits.repeat(num_draws, 1), evenly(num_draws, **settings))
    tokens = torch.tensor([d.token for d in drawn])
    return (torch.bincount(tokens, minlength=len(logits)) / num_draws).tolist()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"temperature": 1.0}, [0.1, 0.4, 0.05, 0.3, 0.15]),
        ({"temperature": 0.0}, [0, 1, 0, 0, 0]),
        ({"temperature": 1e-30}, [0, 1, 0, 0, 0]),
        ({"temperature": 1.0, "top_k": 2}, [0, 4 / 7, 0, 3 / 7, 0]),
        ({"temperature": 1.0, "top_k": 1}, [0, 1, 0, 0, 0]),
        ({"temperature": 1.0, "top_k": 500}, [0.1, 0.4, 0.05, 0.3, 0.15]),
        ({"temperature": 1.0, "top_p": 0.6}, [0, 4 / 7, 0, 3 / 7, 0]),
        ({"temperature": 1.0, "top_p": 0.01}, [0, 1, 0, 0, 0]),
        ({"temperature": 1.0, "top_p": 5e-324}, [0, 1, 0, 0, 0]),  # 0 in fp32
        ({"temperature": 1.0, "top_p": 0.75}, [0, 0.4 / 0.85, 0, 0.3 / 0.85, 0.15 / 0.85]),
        # top_p is a share of what top_k has left: 4/7 of two tokens is more than 0.5
        ({"temperature": 1.0, "top_k": 2, "top_p": 0.5}, [0, 1, 0, 0, 0]),
        ({"temperature": 0.5}, [p**2 / 0.285 for p in (0.1, 0.4, 0.05, 0.3, 0.15)]),
        ({"temperature": 1.0, "min_p": 0.5}, [0, 4 / 7, 0, 3 / 7, 0]),
        ({"temperature": 1.0, "min_p": 1.0}, [0, 1, 0, 0, 0]),
        ({"temperature": 1.0, "min_p": 0.5, "top_k": 4}, [0, 4 / 7, 0, 3 / 7, 0]),
        ({"temperature": 1.0, "min_p": 0.3, "top_p": 0.6}, [0, 4 / 7, 0, 3 / 7, 0]),
    ],
)
def test_tokens_are_drawn_as_often_as_they_should(settings: dict[str, Any], expected: list[float]) -> None:
    assert shares(LOGITS, **settings) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(
    "settings",
    [
        {"top_k": 7},
        {"top_k": 100},
        {"top_p": 0.9},
        {"top_p": 0.3},
        {"min_p": 0.1},
        {"top_p": 0.7, "min_p": 0.2},
        {"top_k": 70, "top_p": 0.8, "min_p": 0.05},
    ],
)
def test_cuts_are_those_of_transformers(settings: dict[str, Any]) -> None:
    logits = torch.randn(1, 600, generator=torch.Generator().manual_seed(1)) * 3
    warpers = LogitsProcessorList([TemperatureLogitsWarper(0.7)])
    if "top_k" in settings:
        warpers.append(TopKLogitsWarper(settings["top_k"]))
    if "top_p" in settings:
        warpers.append(TopPLogitsWarper(settings["top_p"]))
    if "min_p" in settings:
        warpers.append(MinPLogitsWarper(settings["min_p"]))
    expected = warpers(torch.zeros(1, 1, dtype=torch.long), logits.clone()).softmax(-1)[0]
    found = torch.tensor(shares(logits[0], 12_000, temperature=0.7, **settings))
    assert not found[expected == 0].any()
    # After a rejection the draws no longer run evenly: what is left of them is as good as random.
    assert (found - expected).abs().max() < 4e-3


def test_a_seed_draws_as_often_as_the_model_says() -> None:
    logits = torch.randn(1, 600, generator=torch.Generator().manual_seed(2)) * 2
    sequence = Sequence([0], SamplingParams(temperature=1.0, seed=3))
    counts = torch.zeros(600)
    for _ in range(4000):
        counts[sample(logits, [sequence])[0].token] += 1
        sequence._uniform = None
    expected = logits.softmax(-1)[0] * 4000
    is_common = expected > 5
    observed = torch.cat([counts[is_common], counts[~is_common].sum()[None]])
    expected = torch.cat([expected[is_common], expected[~is_common].sum()[None]])
    chi_squared = float(((observed - expected) ** 2 / expected).sum())
    freedom = len(expected) - 1
    assert abs(chi_squared - freedom) < 4 * math.sqrt(2 * freedom)


def test_logprobs_are_of_the_model_and_not_of_what_is_drawn_from() -> None:
    params = SamplingParams(temperature=0.3, top_k=1, logit_bias=((1, 3.0),), num_logprobs=3)
    (drawn,) = sample(LOGITS[None], [Sequence([0], params)])
    assert drawn.token == 1
    assert drawn.logprob == pytest.approx(math.log(0.4), abs=1e-6)
    assert [token for token, _ in drawn.top] == [1, 3, 4]
    assert [p for _, p in drawn.top] == pytest.approx([math.log(p) for p in (0.4, 0.3, 0.15)], abs=1e-6)


def test_logprobs_are_those_of_log_softmax() -> None:
    logits = torch.randn(4, 3000, generator=torch.Generator().manual_seed(4)) * 4
    tokens = torch.tensor([5, 2999, 0, 1024])
    rated = rate(logits, tokens, [0, 2, 0, 20])
    expected = logits.double().log_softmax(-1)
    assert [r.logprob for r in rated] == pytest.approx(expected.gather(1, tokens[:, None])[:, 0].tolist(), abs=2e-6)
    assert [len(r.top) for r in rated] == [0, 2, 0, 20]
    best = expected[3].topk(20)
    assert [token for token, _ in rated[3].top] == best.indices.tolist()
    assert [p for _, p in rated[3].top] == pytest.approx(best.values.tolist(), abs=2e-6)


def random_params(data: st.DataObject) -> SamplingParams:
    def choice(*values: Any) -> Any:
        return data.draw(st.sampled_from(values))

    return SamplingParams(
        temperature=choice(0.0, 0.7, 1.0, 2.0),
        top_k=choice(None, None, 1, 5, 50, 70, 6000),
        top_p=choice(1.0, 0.9, 0.2),
        min_p=choice(0.0, 0.05),
        repetition_penalty=choice(1.0, 1.3),
        presence_penalty=choice(0.0, 0.5),
        frequency_penalty=choice(0.0, -0.7),
        logit_bias=choice((), ((3, 5.0), (7, -100.0))),
        num_logprobs=choice(None, 0, 3, 20),
    )


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_row_is_drawn_alike_in_any_company(data: st.DataObject) -> None:
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    num_rows = data.draw(st.integers(2, 6))
    # 40,000 ids: enough for torch to cut the sum over a single row among its threads. Rounded ones have many ties.
    logits = torch.randn(num_rows, 40_000, generator=generator) * 3
    if data.draw(st.booleans()):
        logits = logits.bfloat16().float()
    params = [random_params(data) for _ in range(num_rows)]
    uniforms = torch.rand(num_rows, generator=generator).tolist()

    def sequence(row: int) -> Sequence:
        made = Sequence([row, 8, 9, 8], params[row], output_ids=[3, 4, 3])
        made._uniform = uniforms[row]
        return made

    together = sample(logits, [sequence(row) for row in range(num_rows)])
    alone = [sample(logits[row : row + 1], [sequence(row)])[0] for row in range(num_rows)]
    assert together == alone


@pytest.mark.parametrize(
    "settings",
    [{}, {"top_k": 3}, {"top_p": 0.5}, {"top_k": 4, "top_p": 0.99}, {"min_p": 0.9}, {"top_p": 0.99, "min_p": 0.01}],
)
@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
def test_the_ends_of_the_interval_draw_tokens_that_can_occur(settings: dict[str, Any], uniform: float) -> None:
    logits = torch.full((1, 1500), -math.inf)
    logits[0, [1, 3, 700, 1040]] = torch.tensor([0.0, 1.0, 2.0, 1.0])
    (drawn,) = sample(logits, [fixed(uniform, temperature=1.0, **settings)])
    assert drawn.token in (1, 3, 700, 1040)


def test_equal_tokens_are_within_top_p_together() -> None:
    logits = torch.tensor([2.0, 1.0, 1.0, 1.0, 0.0])
    assert [share > 0 for share in shares(logits, 100, temperature=1.0, top_p=0.6)] == [True] * 4 + [False]


def test_greedy_takes_the_first_of_the_highest() -> None:
    logits = torch.zeros(2, 1300)
    logits[0, [600, 601, 1299]] = 1.0
    logits[1, 1299] = 1.0
    assert [d.token for d in sample(logits, [Sequence([0], SamplingParams(temperature=0))] * 2)] == [600, 1299]


@pytest.mark.parametrize(
    ("settings", "param"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.01}, "top_p"),
        ({"min_p": -0.1}, "min_p"),
        ({"min_p": math.nan}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"presence_penalty": 2.1}, "presence_penalty"),
        ({"frequency_penalty": -2.1}, "frequency_penalty"),
        ({"logit_bias": ((50, 1.0),)}, "logit_bias"),
        ({"logit_bias": ((-1, 1.0),)}, "logit_bias"),
        ({"logit_bias": ((1, 100.5),)}, "logit_bias"),
        ({"logit_bias": ((1, math.nan),)}, "logit_bias"),
        ({"logit_bias": ((1, 1.0),) * 1025}, "logit_bias"),
        ({"num_logprobs": 21}, "logprobs"),
        ({"num_prompt_logprobs": -1}, "logprobs"),
        ({"stop": ("",)}, "stop"),
        ({"stop": ("a",) * 65}, "stop"),
    ],
)
def test_a_setting_out_of_range_is_named(settings: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidInput, match=param.removeprefix("num_")) as failure:
        check_params(SamplingParams(**settings), vocab_size=50)
    assert failure.value.param == param


def test_settings_at_their_limits_are_fine() -> None:
    check_params(
        SamplingParams(
            max_tokens=1,
            temperature=0.0,
            top_k=1,
            top_p=1.0,
            min_p=1.0,
            presence_penalty=-2.0,
            frequency_penalty=2.0,
            logit_bias=((49, -100.0),),
            num_logprobs=20,
            stop=("a",) * 64,
        ),
        vocab_size=50,
    )
