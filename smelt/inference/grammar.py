"""GrammarState: which tokens may come next, where an answer has to be of a form; knows no model and no request."""

from typing import Protocol

from torch import Tensor


class GrammarState(Protocol):
    """How far an answer is in its grammar."""

    def fill(self, mask: Tensor) -> None:
        """Set, in a row of int32 words of 32 tokens each, lowest bit first, the bits of those that may come next."""

    def accept(self, token: int) -> None:
        """Go on by a token that was allowed."""
