"""Sequence: one prompt and the tokens drawn after it; knows no text, no model and no batch."""

from dataclasses import dataclass, field, replace
from enum import Enum
from random import Random
from typing import TYPE_CHECKING

from smelt.inference.token_counts import TokenCounts
from smelt.types import LOCAL_OWNER, FinishReason, SamplingParams

if TYPE_CHECKING:
    from smelt.inference.grammar import GrammarState

Alternatives = tuple[tuple[int, float], ...]


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
    output_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    # Of each token the (id, log-probability) pairs of the most likely ones, where the params ask for them.
    top_logprobs: list[Alternatives] = field(default_factory=list)
    prompt_logprobs: list[float | None] = field(default_factory=list)  # None for the first token
    prompt_top_logprobs: list[Alternatives] = field(default_factory=list)
    num_cached_tokens: int = 0  # of the prompt, which needed no computing
    status: Status = Status.WAITING
    finish_reason: FinishReason | None = None
    random: Random = field(init=False)
    token_counts: TokenCounts | None = None  # the sampler's, where there are penalties
    _uniform: float | None = None  # drawn, and not used yet

    def __post_init__(self) -> None:
        self.random = Random(self.params.seed)

    @property
    def num_tokens(self) -> int:
        """Prompt and output together."""
        return len(self.prompt_ids) + len(self.output_ids)

    def uniform(self) -> float:
        """The number that decides the next token: the same one until it is appended, so that a step can be redone."""
        if self._uniform is None:
            self._uniform = self.random.random()
        return self._uniform

    def resumed(self, context: list[int], num_left: int) -> "Sequence":
        """What goes on from this context where this sequence stopped, with its luck."""
        sequence = Sequence(context, replace(self.params, max_tokens=num_left))
        sequence.random, sequence._uniform = self.random, self._uniform
        return sequence

    def append(self, token: int, logprob: float, max_length: int) -> None:
        """Take a drawn token, and finish where it, the asked-for number or the context's end says so."""
        self._uniform = None
        self.output_ids.append(token)
        self.logprobs.append(logprob)
        if token in self.params.stop_token_ids:
            self.finish("stop")
        elif len(self.output_ids) >= self.params.max_tokens or self.num_tokens >= max_length:
            self.finish("length")

    def finish(self, reason: FinishReason) -> None:
        """Nothing is drawn after this."""
        self.status = Status.FINISHED
        self.finish_reason = reason
