"""Sequence: one prompt and the tokens drawn after it; knows no text, no model and no batch."""

from dataclasses import dataclass, field, replace
from enum import Enum
from random import Random
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from smelt.inference.token_counts import TokenCounts
from smelt.types import LOCAL_OWNER, FinishReason, SamplingParams

if TYPE_CHECKING:
    from smelt.inference.grammar import GrammarState

Alternatives = tuple[tuple[int, float], ...]


@dataclass(eq=False, slots=True)
class PromptWishes:
    """What else is asked about the places of a prompt but its first token, and the answers as they come.

    `target_ids` (places, K), -1 for none. Of each place so many alternatives are drawn from the model.
    """

    target_ids: NDArray[np.int64] | None
    num_alternatives: int
    seed: int
    target_logprobs: list[list[float]] = field(default_factory=list)  # 0 where there is no target
    alternatives: list[Alternatives] = field(default_factory=list)


class Status(Enum):
    """Where a sequence is on its way through the engine."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False, slots=True)
class Sequence:
    """Token ids in, token ids out. Compared by identity: two requests may ask for the same.

    `logprobs` are of the model's own distribution, before temperature and cut-offs. A stop token is kept as the
    last of `output_ids`. The source of randomness is the sequence's own, so that an answer does not depend on
    which others run at the same time; `params.seed` None draws a fresh one.
    """

    prompt_ids: list[int]
    params: SamplingParams
    owner: str = LOCAL_OWNER  # the scheduler is fair between owners, and no prefix is shared across them
    adapter: str | None = None  # a LoRA adapter that the engine knows by this name
    grammar: "GrammarState | None" = None  # what the answer must look like, and how far it is
    is_live: bool = True  # somebody waits for it, or it has waited for such long enough; the others are of batches
    output_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    # Of each token the (id, log-probability) pairs of the most likely ones, where the params ask for them.
    top_logprobs: list[Alternatives] = field(default_factory=list)
    prompt_logprobs: list[float | None] = field(default_factory=list)  # None for the first token
    prompt_top_logprobs: list[Alternatives] = field(default_factory=list)
    prompt_wishes: PromptWishes | None = None  # only together with `num_prompt_logprobs`
    num_cached_tokens: int = 0  # of the prompt, which needed no computing
    status: Status = Status.WAITING
    finish_reason: FinishReason | None = None
    # The engine's notes: the blocks of its cache, names of the full ones, and how many tokens have been computed.
    block_ids: list[int] = field(default_factory=list)
    block_keys: list[bytes] = field(default_factory=list)
    adapter_version: int = 0  # of those that have had the adapter's name
    num_computed: int = 0
    random: Random = field(init=False)
    token_counts: TokenCounts | None = None  # the sampler's, where there are penalties
    _uniform: float | None = None  # drawn, and not used yet

    def __post_init__(self) -> None:
        self.random = Random(self.params.seed)

    @property
    def num_tokens(self) -> int:
        """Prompt and output together."""
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def newest_token(self) -> int:
        """The last one of prompt and output together."""
        return self.output_ids[-1] if self.output_ids else self.prompt_ids[-1]

    @property
    def lacks_prompt_logprobs(self) -> bool:
        """Whether it asks for some that it does not have yet."""
        wants = self.params.num_prompt_logprobs is not None
        return wants and len(self.prompt_logprobs) < len(self.prompt_ids)

    @property
    def num_skippable(self) -> int:
        """Tokens at the front whose outcome nobody asks for: all but the last, or those with log-probabilities."""
        if self.lacks_prompt_logprobs:
            return max(0, len(self.prompt_logprobs) - 1)
        return self.num_tokens - 1

    def tokens(self, start: int, end: int) -> list[int]:
        """Those of prompt and output together from `start` up to `end`."""
        num_prompt = len(self.prompt_ids)
        if start >= num_prompt:
            return self.output_ids[start - num_prompt : end - num_prompt]
        return self.prompt_ids[start:end] + self.output_ids[: max(0, end - num_prompt)]

    def uniform(self) -> float:
        """The number that decides the next token: the same one until it is appended, so that a step can be redone."""
        if self._uniform is None:
            self._uniform = self.random.random()
        return self._uniform

    def resumed(self, context: list[int], num_left: int) -> "Sequence":
        """What goes on from this context where this sequence stopped, with its luck, penalties and grammar."""
        params = replace(self.params, max_tokens=num_left, num_prompt_logprobs=None)
        sequence = Sequence(context, params, self.owner, self.adapter, self.grammar, self.is_live)
        sequence.random, sequence._uniform = self.random, self._uniform
        if self.token_counts is not None:
            sequence.token_counts = self.token_counts.restarted(self.output_ids)
        return sequence

    def append(self, token: int, logprob: float, top: Alternatives, max_length: int) -> None:
        """Take a drawn token, and finish where it, the asked-for number or the context's end says so.

        `top`: the most likely tokens there, with their log-probabilities.
        """
        is_stop = token in self.params.stop_token_ids
        if self.grammar is not None and not is_stop:
            self.grammar.accept(token)
        self._uniform = None
        self.output_ids.append(token)
        self.logprobs.append(logprob)
        self.top_logprobs.append(top)
        if is_stop:
            self.finish("stop")
        elif len(self.output_ids) >= self.params.max_tokens or self.num_tokens >= max_length:
            self.finish("length")

    def finish(self, reason: FinishReason) -> None:
        """Nothing is drawn after this."""
        self.status = Status.FINISHED
        self.finish_reason = reason
