"""A tiny model that counts its passes, an InferenceServer over it, and what that delivered."""

import queue
from dataclasses import dataclass
from typing import Any

import torch

from smelt.configs import DecoderConfig
from smelt.data.characters import ByteTokenizer
from smelt.errors import NotFound
from smelt.inference.events import End, Event, Load, Piece, Vectors
from smelt.inference.memory import Upkeep
from smelt.inference.server import MAX_WAITING, InferenceServer
from smelt.inference.service import TextModel
from smelt.models.decoder import Decoder
from smelt.types import ChatMessage, SamplingParams


@dataclass(frozen=True)
class Ask:
    prompt: str | tuple[int, ...] = "Hello"
    model: str = "gpt"
    owner: str = "ann"
    messages: tuple[ChatMessage, ...] = ()
    params: SamplingParams = SamplingParams(max_tokens=30, temperature=1.0, seed=1)
    tools: tuple[dict[str, Any], ...] = ()
    num_samples: int = 1
    best_of: int = 1
    must_call: bool = False
    echo: bool = False
    adapter: str | None = None
    is_live: bool = True


def asked(prompt: str, seed: int = 1, max_tokens: int = 30, **changes: Any) -> Ask:
    return Ask(prompt, params=SamplingParams(max_tokens=max_tokens, temperature=1.0, seed=seed), **changes)


class CountingModel(Decoder):
    """Counts forward passes, tokens, and rows that are drawn together; fails on a prompt that begins with `poison`."""

    num_passes = 0
    num_tokens = 0
    max_rows = 0
    poison: int | None = None
    error: BaseException = RuntimeError("a kernel broke")

    def forward(self, batch: Any, attend: Any = None) -> torch.Tensor:
        self.num_passes += 1
        self.num_tokens += batch.tokens.numel()
        if self.poison is not None and ((batch.tokens == self.poison) & (batch.positions == 0)).any():
            raise self.error
        return super().forward(batch, attend)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        self.max_rows = max(self.max_rows, hidden.shape[0])
        logits = super().logits(hidden)
        logits[..., 128:] = -torch.inf
        return logits


def make_model(num_slots: int = 4, block_size: int = 64) -> TextModel:
    config = DecoderConfig(vocab_size=257, block_size=block_size, n_layer=2, n_head=2, n_embd=16)
    decoder = CountingModel(config)
    decoder.initialize(0)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return TextModel(decoder, ByteTokenizer(), num_slots)


def alone(ask: Ask) -> str:
    text = make_model().generate(
        str(ask.prompt), max_tokens=ask.params.max_tokens, temperature=ask.params.temperature, seed=ask.params.seed
    )
    assert isinstance(text, str)
    return text


class Client:
    """A server, and what it delivered so far."""

    def __init__(self, upkeep: Upkeep | None = None, max_waiting: int = MAX_WAITING, **models: Any) -> None:
        self.models = models or {"gpt": make_model()}
        self.num_loads = 0
        self.events: queue.SimpleQueue[list[Event]] = queue.SimpleQueue()
        self.pieces: dict[str, list[Piece]] = {}
        self.ends: dict[str, End] = {}  # the last of each request, or the one that aborted it
        self.answer_ends: dict[str, list[End]] = {}
        self.vectors: dict[str, Vectors] = {}
        self.load = Load()
        self.server = InferenceServer(self.load_model, self.events.put, upkeep, max_waiting)

    def load_model(self, name: str) -> TextModel:
        self.num_loads += 1
        model = self.models.get(name, NotFound(f"no model {name!r}"))
        if callable(model):
            model = model()
        if isinstance(model, BaseException):
            raise model
        return model  # type: ignore[no-any-return]

    def take_round(self) -> None:
        for event in self.events.get(timeout=30):
            if isinstance(event, Piece):
                self.pieces.setdefault(event.key, []).append(event)
            elif isinstance(event, End):
                assert event.index not in [end.index for end in self.answer_ends.get(event.key, ())]
                self.ends[event.key] = event
                self.answer_ends.setdefault(event.key, []).append(event)
            elif isinstance(event, Vectors):
                self.vectors[event.key] = event
            else:
                self.load = event

    def end(self, key: str) -> End:
        while key not in self.ends:
            self.take_round()
        return self.ends[key]

    def begun(self, key: str, num_pieces: int = 1) -> None:
        while len(self.pieces.get(key, ())) < num_pieces:
            self.take_round()

    def until_load(self, *models: str, num_running: int = 0, num_waiting: int = 0) -> None:
        """Return when the server has told that this is what it does."""
        while (self.load.models, self.load.num_running, self.load.num_waiting) != (models, num_running, num_waiting):
            self.take_round()

    def texts(self, key: str, num_answers: int) -> list[str]:
        while len(self.answer_ends.get(key, ())) < num_answers:
            self.take_round()
        pieces = self.pieces[key]
        return ["".join(piece.text for piece in pieces if piece.index == index) for index in range(num_answers)]

    def text(self, key: str) -> str:
        self.end(key)
        return "".join(piece.text for piece in self.pieces.get(key, ()))


@dataclass(frozen=True)
class AskVectors:
    inputs: tuple[str | tuple[int, ...], ...]
    model: str = "gpt"
    owner: str = "ann"
    is_live: bool = True
