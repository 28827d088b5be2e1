"""One thread writes for all: requests join, leave, fail and wait for models without touching each other."""

import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch

from smelt.configs import DecoderConfig
from smelt.data.characters import ByteTokenizer
from smelt.errors import InvalidInput, NotFound, Overloaded, Unavailable
from smelt.inference.events import End, Event, Load, Piece, Vectors
from smelt.inference.memory import Upkeep
from smelt.inference.server import MAX_WAITING, InferenceServer
from smelt.inference.service import TextModel
from smelt.models.decoder import Decoder
from smelt.types import ChatMessage, SamplingParams

pytestmark = pytest.mark.timeout(60)


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
    echo: bool = False
    adapter: str | None = None


def asked(prompt: str, seed: int = 1, max_tokens: int = 30, **changes: Any) -> Ask:
    return Ask(prompt, params=SamplingParams(max_tokens=max_tokens, temperature=1.0, seed=seed), **changes)


class CountingModel(Decoder):
    """Counts forward passes and rows that are drawn together; fails where told to."""

    num_passes = 0
    max_rows = 0
    poison: int | None = None
    error: BaseException = RuntimeError("a kernel broke")

    def forward(self, batch: Any, attend: Any = None) -> torch.Tensor:
        self.num_passes += 1
        if self.poison is not None and (batch.tokens == self.poison).any():
            raise self.error
        return super().forward(batch, attend)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        self.max_rows = max(self.max_rows, hidden.shape[0])
        return super().logits(hidden)


def make_model(num_slots: int = 4, block_size: int = 64) -> TextModel:
    config = DecoderConfig(vocab_size=257, block_size=block_size, n_layer=2, n_head=2, n_embd=16)
    decoder = CountingModel(config)
    decoder.initialize(0)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    model = TextModel(decoder, ByteTokenizer(), num_slots)
    model.engine.vocab_size = 128  # characters of one byte, and no end of text
    return model


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


@pytest.fixture
def client() -> Iterator[Client]:
    client = Client()
    yield client
    client.server.close()


def test_many_at_once_get_what_each_gets_alone(client: Client) -> None:
    asks = {f"{seed}": asked("ab" * seed, seed, max_tokens=20 + 9 * seed) for seed in range(1, 8)}
    for key, ask in asks.items():
        client.server.submit(key, ask)
    assert {key: client.text(key) for key in asks} == {key: alone(ask) for key, ask in asks.items()}
    assert client.models["gpt"].model.max_rows > 1
    for key, ask in asks.items():
        assert client.ends[key] == End(key, "length", len(ask.prompt), ask.params.max_tokens)
        assert sum(len(piece.token_ids) for piece in client.pieces[key]) == ask.params.max_tokens
    assert client.num_loads == 1


def test_a_request_joins_between_steps(client: Client) -> None:
    client.server.submit("long", asked("x", max_tokens=4000))
    client.begun("long", 3)
    client.server.submit("short", asked("y", max_tokens=5))
    assert client.text("short") == alone(asked("y", max_tokens=5))
    assert "long" not in client.ends
    client.server.cancel("long")
    client.end("long")


def test_conversations_and_token_ids(client: Client) -> None:
    turns = (ChatMessage("user", "How are you?"),)
    client.server.submit("chat", Ask(messages=turns))
    client.server.submit("ids", Ask(prompt=(72, 101, 108, 108, 111)))
    model = make_model()
    assert client.text("chat") == model.chat(turns, max_tokens=30, temperature=1.0, seed=1)
    assert client.text("ids") == alone(asked("Hello"))


def test_cancel_frees_the_place_within_a_step() -> None:
    client = Client(gpt=make_model(block_size=8192))
    for key in "abcd":
        client.server.submit(key, asked(key, max_tokens=8000))
    client.server.submit("waits", asked("w", max_tokens=3))
    client.until_load("gpt", num_running=4, num_waiting=1)
    client.server.cancel("b")
    end = client.end("b")
    assert (end.reason, end.error) == ("aborted", None)
    assert end.num_output_tokens == len(client.pieces["b"])
    client.end("waits")
    for key in ("a", "c", "d", "a", "unknown"):
        client.server.cancel(key)
    for key in "acd":
        client.end(key)
    client.until_load("gpt")
    assert not client.models["gpt"].engine.has_work
    client.server.close()


def test_cancelled_before_it_ran_it_never_runs() -> None:
    may_load = threading.Event()
    client = Client(gpt=lambda: (may_load.wait(), make_model())[1])
    client.server.submit("early", asked("x"))
    client.server.submit("other", asked("y"))
    client.server.cancel("early")
    assert client.end("early") == End("early", "aborted")
    may_load.set()
    assert client.text("other") == alone(asked("y"))
    assert "early" not in client.pieces
    client.server.close()


def test_owners_take_turns() -> None:
    client = Client(gpt=make_model(num_slots=1, block_size=8192))
    client.server.submit("a1", asked("a1", max_tokens=1000, owner="a"))
    client.begun("a1")
    for key in ("a2", "a3", "a4", "b1", "b2"):
        client.server.submit(key, asked(key, max_tokens=2, owner=key[0]))
    client.until_load("gpt", num_running=1, num_waiting=5)
    client.end("a4")
    assert list(client.ends) == ["a1", "a2", "b1", "a3", "b2", "a4"]
    client.server.close()


def test_loading_a_model_holds_up_no_other() -> None:
    may_load = threading.Event()
    client = Client(gpt=make_model(), slow=lambda: (may_load.wait(), make_model())[1])
    client.server.submit("now", asked("x"))
    client.begun("now")
    client.server.submit("1", asked("x", model="slow"))
    client.server.submit("2", asked("y", model="slow"))
    assert client.text("now") == alone(asked("x"))
    client.server.submit("then", asked("y"))
    assert client.text("then") == alone(asked("y"))
    client.until_load("gpt", num_waiting=2)
    assert set(client.ends) == {"now", "then"}
    may_load.set()
    assert [client.text("1"), client.text("2")] == [alone(asked("x")), alone(asked("y"))]
    assert client.num_loads == 2
    client.until_load("gpt", "slow")
    client.server.close()


def test_a_model_that_cannot_be_loaded_fails_its_requests_and_is_tried_again(client: Client) -> None:
    client.models["sick"] = MemoryError()
    client.server.submit("1", asked("x", model="nowhere"))
    client.server.submit("2", asked("x", model="sick"))
    missing, no_memory = client.end("1"), client.end("2")
    assert isinstance(missing.error, NotFound)
    assert isinstance(no_memory.error, Unavailable)
    assert "not enough memory" in str(no_memory.error)
    client.models["sick"] = make_model()
    client.server.submit("3", asked("x", model="sick"))
    assert client.text("3") == alone(asked("x"))


def test_preloading_is_loading_once(client: Client) -> None:
    client.server.preload("gpt")
    client.until_load("gpt")
    client.server.submit("1", asked("x"))
    client.end("1")
    assert client.num_loads == 1


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (asked("x" * 80), "80 tokens, but the model's context is 64"),
        (Ask((5, 900)), "token ids outside of"),
        (Ask(params=SamplingParams(temperature=-1.0)), "temperature"),
        (Ask(params=SamplingParams(max_tokens=0)), "max_tokens"),
    ],
)
def test_what_the_model_cannot_do_fails_alone(client: Client, ask: Ask, message: str) -> None:
    client.server.submit("good", asked("x"))
    client.server.submit("bad", ask)
    end = client.end("bad")
    assert isinstance(end.error, InvalidInput)
    assert message in str(end.error)
    assert end.reason == "aborted"
    assert client.text("good") == alone(asked("x"))


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (RuntimeError("a kernel broke"), RuntimeError),
        (torch.OutOfMemoryError("CUDA out of memory"), Unavailable),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), Unavailable),
    ],
)
def test_poison_fails_alone_and_the_others_go_on_as_if_nothing_had_been(
    client: Client, error: Exception, kind: type[Exception]
) -> None:
    decoder = client.models["gpt"].model
    decoder.poison, decoder.error = 200, error  # no answer draws it
    client.server.submit("1", asked("first", 1, 60))
    client.server.submit("2", asked("second", 2, 90))
    client.begun("2", 5)
    client.server.submit("bad", Ask((200, 5)))
    client.server.submit("3", asked("third", 3, 20))
    assert type(client.end("bad").error) is kind
    for key, ask in {"1": asked("first", 1, 60), "2": asked("second", 2, 90), "3": asked("third", 3, 20)}.items():
        assert client.text(key) == alone(ask)
        assert client.ends[key].error is None


def test_idle_costs_no_processor_time(client: Client) -> None:
    client.server.submit("1", asked("x", max_tokens=2))
    client.end("1")
    time.sleep(0.1)  # the report after the end
    passes, start = client.models["gpt"].model.num_passes, time.process_time()
    time.sleep(0.5)
    assert time.process_time() - start < 0.1
    assert client.models["gpt"].model.num_passes == passes


def test_close_ends_it_in_the_middle_of_an_answer(client: Client) -> None:
    client.server.submit("1", asked("x", max_tokens=100_000))
    client.begun("1")
    client.server.close()
    assert client.server.ended.done()


def test_a_bug_in_its_own_thread_is_not_silent() -> None:
    def broken(events: list[Event]) -> None:
        raise ZeroDivisionError

    server = InferenceServer(lambda name: make_model(), broken)
    server.submit("1", asked("x"))
    assert isinstance(server.ended.exception(timeout=30), ZeroDivisionError)
    server.close()


@pytest.mark.parametrize("changes", [{"num_samples": 3}, {"num_samples": 3, "best_of": 3}])
def test_several_answers_are_what_their_seeds_give(client: Client, changes: dict[str, Any]) -> None:
    client.server.submit("n", asked("Hello", seed=7, **changes))
    assert client.texts("n", 3) == [alone(asked("Hello", seed=7 + index)) for index in range(3)]
    ends = client.answer_ends["n"]
    assert sorted(end.index for end in ends) == [0, 1, 2]
    assert {(end.num_prompt_tokens, end.num_output_tokens, end.num_cached_tokens) for end in ends} == {(5, 30, 0)}


def test_without_a_seed_each_answer_is_another(client: Client) -> None:
    ask = Ask(params=SamplingParams(max_tokens=30, temperature=1.0), num_samples=4)
    client.server.submit("n", ask)
    assert len(set(client.texts("n", 4))) == 4


def test_the_likeliest_are_given_and_nothing_before_they_are_known(client: Client) -> None:
    model = make_model()
    params = SamplingParams(max_tokens=12, temperature=1.0, num_logprobs=0)
    drawn = [model.answers_to("Hello", replace(params, seed=seed))[0] for seed in range(3, 9)]
    for answer in drawn:
        model.begin(answer)
        while answer.finish_reason is None:
            model.step()
    likeliest = sorted(drawn, key=lambda answer: -answer.mean_logprob)[:2]
    client.server.submit("best", Ask(params=replace(params, seed=3), num_samples=2, best_of=6))
    assert client.texts("best", 2) == [answer.news().text for answer in likeliest]
    assert len(client.pieces["best"]) == 2  # each whole
    assert [end.index for end in client.answer_ends["best"]] == [0, 1]


def test_the_prompt_may_be_repeated_and_scored(client: Client) -> None:
    params = SamplingParams(max_tokens=3, temperature=0, num_logprobs=2)
    client.server.submit("echo", Ask(params=params, echo=True, num_samples=2))
    texts = client.texts("echo", 2)
    assert texts[0] == texts[1]
    assert texts[0].startswith("Hello")
    scored = [logprob for piece in client.pieces["echo"] if piece.index == 0 for logprob in piece.logprobs]
    assert b"".join(token.text for token in scored).decode() == texts[0]
    assert [token.logprob is None for token in scored] == [True] + [False] * 7
    client.server.submit("score", Ask(params=replace(params, max_tokens=0), echo=True))
    assert client.text("score") == "Hello"
    assert client.ends["score"].reason == "length"
    assert client.ends["score"].num_output_tokens == 0
    assert [t.logprob for piece in client.pieces["score"] for t in piece.logprobs] == [t.logprob for t in scored[:5]]


def test_log_probabilities_are_of_the_tokens_shown(client: Client) -> None:
    client.server.submit("p", Ask(params=SamplingParams(max_tokens=9, temperature=1.0, seed=2, num_logprobs=3)))
    text = client.text("p")
    for piece in client.pieces["p"]:
        assert b"".join(token.text for token in piece.logprobs).decode() == piece.text
    scored = [token for piece in client.pieces["p"] for token in piece.logprobs]
    assert len(scored) == len(text) == 9
    assert all(len(token.top) == 3 and token.top[0].logprob >= token.logprob for token in scored)


def test_cancelling_ends_all_answers_of_a_request() -> None:
    client = Client(gpt=make_model(block_size=8192))
    client.server.submit("n", asked("x", max_tokens=8000, num_samples=3))
    client.begun("n", 6)
    client.server.cancel("n")
    end = client.end("n")
    assert (end.reason, end.error, end.num_output_tokens) == ("aborted", None, len(client.pieces["n"]))
    client.until_load("gpt")
    assert client.load.model_loads[0].num_blocks_used == 0
    client.server.close()


def test_a_cancelled_answer_s_blocks_are_free_before_the_next_step() -> None:
    client = Client(gpt=make_model(block_size=8192))
    model = client.models["gpt"]
    client.server.submit("goes", asked("x", max_tokens=8000))
    client.server.submit("stays", asked("y", max_tokens=8000))
    client.begun("stays", 3)
    passes: list[int] = []
    abort = model.abort
    model.abort = lambda answer: (abort(answer), passes.append(model.model.num_passes))
    client.server.cancel("goes")
    asked_at = model.model.num_passes
    client.end("goes")
    assert passes[0] - asked_at <= 1  # the step that was under way
    client.server.close()


def test_a_failing_request_with_several_answers_fails_once(client: Client) -> None:
    decoder = client.models["gpt"].model
    decoder.poison = 200
    client.server.submit("good", asked("first", 1, 40))
    client.begun("good", 3)
    client.server.submit("bad", Ask((200, 5), num_samples=3))
    assert isinstance(client.end("bad").error, RuntimeError)
    assert client.text("good") == alone(asked("first", 1, 40))
    assert [end.key for end in client.answer_ends["bad"]] == ["bad"]


def test_a_full_queue_is_said_so() -> None:
    may_load = threading.Event()
    client = Client(max_waiting=2, gpt=lambda: (may_load.wait(), make_model())[1])
    for key in ("1", "2", "3"):
        client.server.submit(key, asked(key))
    error = client.end("3").error
    assert isinstance(error, Overloaded)
    assert "2 requests wait for gpt already" in str(error)
    may_load.set()
    assert client.text("1") == alone(asked("1"))
    client.server.submit("4", asked("4"))
    assert client.text("4") == alone(asked("4"))
    client.server.close()


@dataclass(frozen=True)
class AskVectors:
    inputs: tuple[str | tuple[int, ...], ...]
    model: str = "gpt"
    owner: str = "ann"


def test_vectors_come_while_answers_are_written() -> None:
    client = Client(gpt=make_model(block_size=8192))
    client.server.submit("text", asked("x", max_tokens=3000))
    client.begun("text", 2)
    inputs = ("a" * 3000, "bc", (65, 66), "d" * 700)
    client.server.embed("vectors", AskVectors(inputs))
    end = client.end("vectors")
    assert (end.reason, end.num_prompt_tokens) == ("stop", 3704)
    vectors = client.vectors["vectors"]
    found = np.frombuffer(vectors.vectors, "<f4").reshape(4, vectors.width)
    np.testing.assert_allclose(found, make_model(block_size=8192).embed(inputs), atol=1e-6)
    num_pieces = len(client.pieces["text"])
    assert num_pieces >= 12  # one at least between two slices
    client.server.embed("long", AskVectors(("x" * 9000,)))
    assert "9000 tokens" in str(client.end("long").error)
    client.server.cancel("text")
    client.end("text")
    client.server.close()


def test_vectors_may_be_cancelled() -> None:
    client = Client(gpt=make_model(block_size=8192))
    client.server.embed("vectors", AskVectors(("a" * 8000,) * 50))
    client.server.cancel("vectors")
    assert client.end("vectors").reason == "aborted"
    client.server.submit("1", asked("x"))
    assert len(client.text("1")) == 30
    assert "vectors" not in client.vectors
    client.server.close()


def test_models_are_loaded_and_unloaded_when_told(client: Client) -> None:
    client.server.load("l1", "gpt")
    assert client.end("l1") == End("l1", "stop")
    client.server.load("l2", "gpt")
    assert client.end("l2").error is None
    client.server.load("l3", "nowhere")
    assert isinstance(client.end("l3").error, NotFound)
    assert client.num_loads == 2
    client.server.submit("runs", asked("x", max_tokens=200))
    client.begun("runs")
    client.server.unload("u1", "gpt")
    client.server.submit("later", asked("y"))
    client.server.unload("u2", "nowhere")
    assert client.end("u2") == End("u2", "stop")
    client.end("u1")
    assert client.ends["runs"].num_output_tokens == 200
    assert "later" not in client.ends
    assert client.text("later") == alone(asked("y"))
    assert client.num_loads == 3
    client.server.unload("u3", "gpt")
    client.end("u3")
    client.until_load()
