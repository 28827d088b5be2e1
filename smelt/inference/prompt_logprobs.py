"""Log-probabilities of prompts, from the hidden states of their chunks; knows no cache and no order of work."""

from collections.abc import Callable

import torch
from torch import Tensor

from smelt.inference.sampler import rate
from smelt.inference.scheduler import Chunk
from smelt.inference.sequence import PromptWishes, Sequence

SLICE = 64  # positions whose logits are in memory at once


def rate_prompt(logits: Callable[[Tensor], Tensor], chunk: Chunk, hidden_TC: Tensor) -> None:
    """Write into the chunk's sequence how likely its prompt's tokens were, where it asks for that and lacks it.

    A hidden state tells of the next token, so a chunk's last one may tell of a token that comes with the next chunk.
    """
    sequence = chunk.sequence
    if not sequence.lacks_prompt_logprobs:
        return
    if not sequence.prompt_logprobs:
        sequence.prompt_logprobs.append(None)
        sequence.prompt_top_logprobs.append(())
    first = len(sequence.prompt_logprobs) - 1
    last = min(chunk.end, len(sequence.prompt_ids) - 1)
    for start in range(first, last, SLICE):
        end = min(start + SLICE, last)
        logits_TV = logits(hidden_TC[start - chunk.start : end - chunk.start])
        _take(sequence, logits_TV, sequence.prompt_ids[start + 1 : end + 1])
        if sequence.prompt_wishes is not None:
            _grant(sequence.prompt_wishes, logits_TV, start)


def _take(sequence: Sequence, logits_TV: Tensor, next_ids: list[int]) -> None:
    num_alternatives = [sequence.params.num_prompt_logprobs or 0] * len(next_ids)
    for _, logprob, top in rate(logits_TV, torch.tensor(next_ids, device=logits_TV.device), num_alternatives):
        sequence.prompt_logprobs.append(logprob)
        sequence.prompt_top_logprobs.append(top)


def _grant(wishes: PromptWishes, logits_TV: Tensor, start: int) -> None:
    logprobs_TV = logits_TV.log_softmax(dim=-1)
    if wishes.target_ids is not None:
        targets_TK = torch.from_numpy(wishes.target_ids[start : start + len(logits_TV)]).to(logits_TV.device)
        found_TK = logprobs_TV.gather(1, targets_TK.clamp(min=0)).masked_fill(targets_TK < 0, 0.0)
        wishes.target_logprobs += found_TK.tolist()
    for row in range(len(logits_TV) if wishes.num_alternatives else 0):
        # A source of its own for each place: chunks of a prompt may be cut anywhere.
        generator = torch.Generator().manual_seed(wishes.seed + start + row)
        drawn = torch.multinomial(logprobs_TV[row].exp().cpu(), wishes.num_alternatives, True, generator=generator)
        values = logprobs_TV[row].cpu()[drawn]
        wishes.alternatives.append(tuple(zip(drawn.tolist(), values.tolist(), strict=True)))
