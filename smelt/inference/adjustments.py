"""What settings do to the logits before a token is drawn: biases, penalties and grammars; knows no drawing.

In this order: `logit_bias` is added, tokens that were there before are penalised, and what the grammar forbids
becomes impossible. Shapes: B rows, V token ids.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from smelt.inference.sequence import Sequence
from smelt.inference.token_counts import TokenCounts
from smelt.types import SamplingParams

BITS_PER_WORD = 32  # of a grammar's mask


def adjust(logits_BV: Tensor, sequences: list[Sequence]) -> Tensor:
    """The logits as the sequences' settings want them: a copy, or the same tensor where nobody wants a change."""
    biased = [row for row, s in enumerate(sequences) if s.params.logit_bias]
    penalised = [row for row, s in enumerate(sequences) if _has_penalty(s.params)]
    formed = [row for row, s in enumerate(sequences) if s.grammar is not None]
    if not (biased or penalised or formed):
        return logits_BV
    scores_BV = logits_BV.clone()
    if biased:
        _add_biases(scores_BV, biased, sequences)
    if penalised:
        _penalise(scores_BV, penalised, sequences)
    if formed:
        _forbid(scores_BV, formed, sequences)
    return scores_BV


def _has_penalty(params: SamplingParams) -> bool:
    return params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0


def _add_biases(scores_BV: Tensor, rows: list[int], sequences: list[Sequence]) -> None:
    entries = [(row, token, bias) for row in rows for token, bias in sequences[row].params.logit_bias]
    row_ids, tokens, biases = zip(*entries, strict=True)
    device = scores_BV.device
    places = (torch.tensor(row_ids, device=device), torch.tensor(tokens, device=device))
    scores_BV.index_put_(places, torch.tensor(biases, dtype=scores_BV.dtype, device=device), accumulate=True)


def _penalise(scores_BV: Tensor, rows: list[int], sequences: list[Sequence]) -> None:
    """Repetition scales a logit away from likely, presence and frequency subtract from it."""
    counted = [_counts(sequences[row]) for row in rows]
    sizes = [len(ids) for ids, _ in counted]

    def spread(values: list[float]) -> Tensor:
        """One value per row -> one per token of the row."""
        return torch.from_numpy(np.repeat(np.array(values, np.float32), sizes)).to(scores_BV.device)

    ids = torch.from_numpy(np.concatenate([ids for ids, _ in counted])).to(scores_BV.device)
    counts = torch.from_numpy(np.concatenate([counts for _, counts in counted])).to(scores_BV.device)
    places = (torch.from_numpy(np.repeat(rows, sizes)).to(scores_BV.device), ids)
    own = [sequences[row].params for row in rows]
    scores = scores_BV[places]
    repetition = spread([p.repetition_penalty for p in own])
    scores = torch.where(scores > 0, scores / repetition, scores * repetition)
    scores -= spread([p.frequency_penalty for p in own]) * counts
    scores -= spread([p.presence_penalty for p in own]) * (counts > 0)
    scores_BV[places] = scores


def _counts(sequence: Sequence) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    if sequence.token_counts is None:
        looks_at_prompt = sequence.params.repetition_penalty != 1
        sequence.token_counts = TokenCounts(sequence.prompt_ids if looks_at_prompt else ())
    return sequence.token_counts.update(sequence.output_ids)


def _forbid(scores_BV: Tensor, rows: list[int], sequences: list[Sequence]) -> None:
    num_words = -(-scores_BV.shape[1] // BITS_PER_WORD)
    words_BW = torch.zeros(len(rows), num_words, dtype=torch.int32)
    for mask, row in zip(words_BW, rows, strict=True):
        grammar = sequences[row].grammar
        assert grammar is not None, "these rows have one"
        grammar.fill(mask)
    shifts = torch.arange(BITS_PER_WORD, dtype=torch.int32, device=scores_BV.device)
    bits_BV = (words_BW.to(scores_BV.device)[:, :, None] >> shifts & 1).flatten(1)[:, : scores_BV.shape[1]]
    scores_BV[rows] = torch.where(bits_BV.bool(), scores_BV[rows], -torch.inf)
