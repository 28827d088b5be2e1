from typing import Any

import torch
from torch import Tensor
from transformers import RepetitionPenaltyLogitsProcessor

from smelt.inference.adjustments import adjust
from smelt.inference.sequence import Sequence
from smelt.types import SamplingParams

NUM_IDS = 100


def logits_of(num_rows: int) -> Tensor:
    return torch.randn(num_rows, NUM_IDS, generator=torch.Generator().manual_seed(0)) * 3


def sequence(prompt_ids: list[int], output_ids: list[int], **settings: Any) -> Sequence:
    return Sequence(prompt_ids, SamplingParams(**settings), output_ids=output_ids)


def test_without_settings_nothing_is_copied() -> None:
    logits = logits_of(2)
    assert adjust(logits, [sequence([1], [2])] * 2) is logits


def test_the_model_s_logits_stay_as_they_are() -> None:
    logits = logits_of(1)
    before = logits.clone()
    adjust(logits, [sequence([1], [2], repetition_penalty=2.0, logit_bias=((3, 1.0),))])
    assert torch.equal(logits, before)


def test_repetition_penalty_is_that_of_transformers() -> None:
    logits = logits_of(1)
    prompt, output = [5, 6, 6, 99, 0], [7, 5, 7]
    expected = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([prompt + output]), logits.clone())
    assert torch.equal(adjust(logits, [sequence(prompt, output, repetition_penalty=1.7)]), expected)


def test_presence_and_frequency_penalties_look_at_the_answer_alone() -> None:
    logits = logits_of(1)
    expected = logits.clone()
    expected[0, 7] -= 0.5 + 3 * 0.25
    expected[0, 8] -= 0.5 + 1 * 0.25
    adjusted = adjust(logits, [sequence([5, 7], [7, 7, 8, 7], presence_penalty=0.5, frequency_penalty=0.25)])
    torch.testing.assert_close(adjusted, expected, atol=1e-6, rtol=0)


def test_biases_are_added_before_penalties_and_repeated_ones_add_up() -> None:
    logits = logits_of(1)
    expected = logits.clone()
    expected[0, 4] += 3.0
    expected[0, 9] = torch.tensor(2.0 - 20.0) * 1.5
    logits[0, 9] = 2.0
    bias = ((4, 1.0), (4, 2.0), (9, -20.0))
    adjusted = adjust(logits, [sequence([9], [], repetition_penalty=1.5, logit_bias=bias)])
    torch.testing.assert_close(adjusted, expected, atol=1e-6, rtol=0)


def test_each_row_has_its_own_settings() -> None:
    logits = logits_of(4)
    rows = [
        sequence([1, 2], [3], repetition_penalty=1.2),
        sequence([1, 2], [3]),
        sequence([1, 2], [3, 4, 3], frequency_penalty=1.0),
        sequence([1, 2], [3], logit_bias=((2, 9.0),)),
    ]
    together = adjust(logits, rows)
    for row, alone in enumerate(rows):
        assert torch.equal(together[row : row + 1], adjust(logits[row : row + 1], [alone]))


def test_counts_grow_with_the_answer() -> None:
    """A long answer, step by step, is penalised as one that is counted at once."""
    logits = logits_of(1)
    settings = {"repetition_penalty": 1.1, "frequency_penalty": 0.1}
    growing = sequence(list(range(70)), [], **settings)
    tokens = torch.randint(0, NUM_IDS, (300,), generator=torch.Generator().manual_seed(1)).tolist()
    for token in tokens:
        adjusted = adjust(logits, [growing])
        growing.output_ids.append(token)
        if len(growing.output_ids) % 100 == 1:
            at_once = sequence(list(range(70)), growing.output_ids[:-1], **settings)
            assert torch.equal(adjusted, adjust(logits, [at_once]))


def test_an_answer_that_outgrows_its_context_keeps_its_penalties() -> None:
    logits = logits_of(1)
    first = sequence([1, 2], [3, 4], repetition_penalty=1.5, frequency_penalty=0.5)
    adjust(logits, [first])
    first.output_ids.append(3)
    resumed = first.resumed([4, 3], num_left=10)
    resumed.output_ids.append(3)
    at_once = sequence([1, 2], [3, 4, 3, 3], repetition_penalty=1.5, frequency_penalty=0.5)
    assert torch.equal(adjust(logits, [resumed]), adjust(logits, [at_once]))


class Fixed:
    """A grammar that always allows the same tokens."""

    def __init__(self, *allowed: int) -> None:
        self.allowed = allowed

    def fill(self, mask: Tensor) -> None:
        for token in self.allowed:
            mask[token // 32] |= torch.tensor(1 << token % 32, dtype=torch.int64).to(torch.int32)

    def accept(self, token: int) -> None:
        assert token in self.allowed


def test_a_grammar_leaves_what_it_allows() -> None:
    logits = logits_of(3)
    rows = [sequence([1], []) for _ in range(3)]
    rows[0].grammar = Fixed(0, 31, 63, 95)
    rows[2].grammar = Fixed(99)
    adjusted = adjust(logits, rows)
    assert adjusted[0].isfinite().nonzero()[:, 0].tolist() == [0, 31, 63, 95]
    assert torch.equal(adjusted[0, [0, 31, 63, 95]], logits[0, [0, 31, 63, 95]])
    assert torch.equal(adjusted[1], logits[1])
    assert adjusted[2].isfinite().nonzero()[:, 0].tolist() == [99]
