import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smelt.inference.sampler import sample
from smelt.types import SamplingParams

LOGITS = torch.tensor([math.log(p) for p in (0.1, 0.4, 0.05, 0.3, 0.15)])


def shares(num_draws: int = 4000, **settings: Any) -> list[float]:
    """How often each token is drawn when the uniforms run evenly through [0, 1)."""
    uniforms = [(i + 0.5) / num_draws for i in range(num_draws)]
    tokens, _ = sample(LOGITS.expand(num_draws, -1), [SamplingParams(**settings)] * num_draws, uniforms)
    return [float((tokens == token).float().mean()) for token in range(5)]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"temperature": 1.0}, [0.1, 0.4, 0.05, 0.3, 0.15]),
        ({"temperature": 0.0}, [0, 1, 0, 0, 0]),
        ({"temperature": 1.0, "top_k": 2}, [0, 4 / 7, 0, 3 / 7, 0]),
        ({"temperature": 1.0, "top_k": 1}, [0, 1, 0, 0, 0]),
        ({"temperature": 1.0, "top_k": 500}, [0.1, 0.4, 0.05, 0.3, 0.15]),
        ({"temperature": 1.0, "top_p": 0.6}, [0, 4 / 7, 0, 3 / 7, 0]),
        ({"temperature": 1.0, "top_p": 0.01}, [0, 1, 0, 0, 0]),
        ({"temperature": 1.0, "top_p": 0.75}, [0, 0.4 / 0.85, 0, 0.3 / 0.85, 0.15 / 0.85]),
        # top_p is a share of what top_k has left: 4/7 of two tokens is more than 0.5
        ({"temperature": 1.0, "top_k": 2, "top_p": 0.5}, [0, 1, 0, 0, 0]),
        ({"temperature": 0.5}, [p**2 / 0.285 for p in (0.1, 0.4, 0.05, 0.3, 0.15)]),
    ],
)
def test_tokens_are_drawn_as_often_as_they_should(settings: dict[str, Any], expected: list[float]) -> None:
    assert shares(**settings) == pytest.approx(expected, abs=1e-3)


def test_logprobs_are_of_the_model_and_not_of_the_cut_distribution() -> None:
    tokens, logprobs = sample(LOGITS[None], [SamplingParams(temperature=0.3, top_k=1)], [0.5])
    assert tokens.tolist() == [1]
    assert logprobs.tolist() == pytest.approx([math.log(0.4)], abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_row_is_drawn_alike_in_any_company(data: st.DataObject) -> None:
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    num_rows = data.draw(st.integers(2, 6))
    logits = torch.randn(num_rows, 50, generator=generator) * 3
    params = [
        SamplingParams(
            temperature=data.draw(st.sampled_from([0.0, 0.7, 1.0, 2.0])),
            top_k=data.draw(st.sampled_from([None, 1, 5, 50, 60])),
            top_p=data.draw(st.sampled_from([1.0, 0.9, 0.2])),
        )
        for _ in range(num_rows)
    ]
    uniforms = torch.rand(num_rows, generator=generator).tolist()
    together, _ = sample(logits, params, uniforms)
    alone = [int(sample(logits[i : i + 1], [params[i]], [uniforms[i]])[0]) for i in range(num_rows)]
    assert together.tolist() == alone


@pytest.mark.parametrize("settings", [{}, {"top_k": 3}, {"top_p": 0.5}, {"top_k": 4, "top_p": 0.99}])
@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
def test_the_ends_of_the_interval_draw_tokens_that_can_occur(settings: dict[str, Any], uniform: float) -> None:
    logits = torch.tensor([[-math.inf, 0.0, -math.inf, 1.0, 2.0, -math.inf]])
    tokens, _ = sample(logits, [SamplingParams(temperature=1.0, **settings)], [uniform])
    assert int(tokens) in (1, 3, 4)
