"""TokenCounts: how often an answer has each token, kept as it grows; knows no settings and no logits."""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

INITIAL_IDS = 64


class TokenCounts:
    """The token ids of a sequence, each once, with how often its answer has them; grows as the answer does."""

    def __init__(self, prompt_ids: Iterable[int]) -> None:
        self._slots: dict[int, int] = {}
        self._ids = np.empty(INITIAL_IDS, np.int64)
        self._counts = np.zeros(INITIAL_IDS, np.float32)
        self._num_counted = 0
        for token in prompt_ids:
            self._slot(token)

    def update(self, output_ids: list[int]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """(ids, counts), after counting what the answer has that was not counted before."""
        for token in output_ids[self._num_counted :]:
            self._counts[self._slot(token)] += 1
        self._num_counted = len(output_ids)
        return self._ids[: len(self._slots)], self._counts[: len(self._slots)]

    def restarted(self, output_ids: list[int]) -> "TokenCounts":
        """These counts, for an answer that goes on from here as if it began anew."""
        self.update(output_ids)
        self._num_counted = 0
        return self

    def _slot(self, token: int) -> int:
        slot = self._slots.setdefault(token, len(self._slots))
        if slot == len(self._ids):
            self._ids = np.concatenate([self._ids, np.empty_like(self._ids)])
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
        self._ids[slot] = token
        return slot
