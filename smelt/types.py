"""Plain values that several packages pass to each other; knows no torch, no files, no web."""

from dataclasses import dataclass, field
from typing import Literal

LOCAL_OWNER = "local"  # who owns what was asked for on this machine without a key

FinishReason = Literal["stop", "length", "aborted"]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to draw tokens. `temperature` 0 is greedy; `top_k` None and `top_p` 1 keep every token."""

    max_tokens: int = 100
    temperature: float = 0.8
    top_k: int | None = None
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = field(default_factory=frozenset)


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One turn of a conversation."""

    role: str
    content: str
