"""What one request is given: several answers, the likeliest, the prompt again, vectors; and that it ends whole."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from asking import Ask, AskVectors, Client, alone, asked, make_model
from smelt.errors import InvalidInput
from smelt.types import ChatMessage, Grammar, SamplingParams

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def client() -> Iterator[Client]:
    client = Client()
    yield client
    client.server.close()


def test_conversations_and_token_ids(client: Client) -> None:
    turns = (ChatMessage("user", "How are you?"),)
    client.server.submit("chat", Ask(messages=turns))
    client.server.submit("ids", Ask(prompt=(72, 101, 108, 108, 111)))
    model = make_model()
    assert client.text("chat") == model.chat(turns, max_tokens=30, temperature=1.0, seed=1)
    assert client.text("ids") == alone(asked("Hello"))


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


def test_a_failing_request_with_several_answers_fails_once(client: Client) -> None:
    decoder = client.models["gpt"].model
    decoder.poison = 7
    client.server.submit("good", asked("first", 1, 40))
    client.begun("good", 3)
    client.server.submit("bad", Ask((7, 5), num_samples=3))
    assert isinstance(client.end("bad").error, RuntimeError)
    assert client.text("good") == alone(asked("first", 1, 40))
    assert [end.key for end in client.answer_ends["bad"]] == ["bad"]


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


class Tiresome:
    """A grammar that allows everything, and is refused at its third token."""

    def __init__(self) -> None:
        self.num_tokens = 0

    def fill(self, mask: torch.Tensor) -> None:
        if self.num_tokens == 2:
            raise InvalidInput("the answer's form is too complex", "response_format")
        mask.fill_(-1)

    def accept(self, token: int) -> None:
        self.num_tokens += 1

    def fork(self) -> "Tiresome":
        return Tiresome()


def test_a_grammar_that_becomes_too_expensive_costs_others_nothing(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("smelt.inference.grammar.GrammarCompiler.start", lambda *_: Tiresome())
    model = client.models["gpt"]
    client.server.submit("good", asked("x" * 20, 1, 40))
    client.begun("good", 3)
    params = SamplingParams(max_tokens=9, temperature=1.0, seed=1, grammar=Grammar("json"))
    client.server.submit("bad", Ask("y" * 20, params=params))
    assert "too complex" in str(client.end("bad").error)
    assert client.ends["bad"].num_output_tokens == 2
    assert client.text("good") == alone(asked("x" * 20, 1, 40))
    client.until_load("gpt")
    assert model.model.num_tokens < 20 + 40 + 20 + 2 + 3 * 16  # a part of a block for each again
