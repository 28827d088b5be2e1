"""OpenAI's client against `smelt serve` with a tiny model: what is asked for is what the model does."""

import json
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import httpx
import openai
import pytest

from processes import eventually
from serving import serving, write_tiny_model

pytestmark = pytest.mark.timeout(180)

MESSAGES: Any = [{"role": "user", "content": "Hi"}]
GREEDY: Any = {"model": "tiny", "prompt": "To be", "max_tokens": 8, "temperature": 0}


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("live")
    write_tiny_model(folder / "home/models/ending", vocab_size=257)  # with a token for the end of the text
    with serving(folder / "home", str(write_tiny_model(folder / "tiny", vocab_size=128))) as server:
        yield server.url


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=2) as client:
        yield client


def text_of(client: openai.OpenAI, **asked: Any) -> str:
    return client.completions.create(**{**GREEDY, **asked}).choices[0].text


def test_seeds_samples_and_the_best_of_them(client: openai.OpenAI) -> None:
    drawn: Any = {"temperature": 1, "seed": 5, "max_tokens": 6, "logprobs": 0}
    alone = [client.completions.create(**{**GREEDY, **drawn, "seed": 5 + index}).choices[0] for index in range(3)]
    together = client.completions.create(**{**GREEDY, **drawn, "n": 3})
    assert [choice.text for choice in together.choices] == [choice.text for choice in alone]
    assert together.usage is not None
    assert (together.usage.prompt_tokens, together.usage.completion_tokens) == (5, 18)

    def likelihood(choice: Any) -> float:
        return sum(choice.logprobs.token_logprobs) / len(choice.logprobs.token_logprobs)

    best = client.completions.create(**{**GREEDY, **drawn, "best_of": 3}).choices[0]
    assert best.text == max(alone, key=likelihood).text


def test_log_probabilities_are_the_models_own(client: openai.OpenAI) -> None:
    asked = {**GREEDY, "logprobs": 5, "max_tokens": 3}
    written = client.completions.create(**asked).choices[0]
    assert written.logprobs is not None
    assert written.logprobs.top_logprobs is not None
    for token, logprob, likely in zip(
        written.logprobs.tokens or (), written.logprobs.token_logprobs or (), written.logprobs.top_logprobs, strict=True
    ):
        assert likely[token] == logprob == max(likely.values())
        assert sum(map(math.exp, likely.values())) <= 1
    # Scored as a prompt, the same tokens are as likely.
    whole = client.completions.create(**{**asked, "prompt": "To be" + written.text, "max_tokens": 0, "echo": True})
    scored = whole.choices[0].logprobs
    assert scored is not None
    assert whole.choices[0].text == "To be" + written.text
    assert (scored.tokens or [])[:5] == list("To be")
    assert (scored.token_logprobs or [])[0] is None
    # Where bf16 is fast that is what it has: with heads of 8, torch attends for drawn tokens and our kernel in prompts.
    assert (scored.token_logprobs or [])[5:] == pytest.approx(written.logprobs.token_logprobs, abs=2e-3)
    chat = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=4, logprobs=True, top_logprobs=2)
    assert chat.choices[0].logprobs is not None
    assert all(len(token.top_logprobs) == 2 for token in chat.choices[0].logprobs.content or ())


def test_settings_change_what_is_written(client: openai.OpenAI) -> None:
    plain = text_of(client)
    first = plain[0]
    assert text_of(client) == plain
    assert text_of(client, extra_body={"top_k": 1}, temperature=1) == plain
    assert text_of(client, extra_body={"min_p": 1.0}, temperature=1) == plain
    assert text_of(client, logit_bias={str(ord(first)): -100})[0] != first
    assert text_of(client, stop=plain[1:3]) == plain[: plain.index(plain[1:3])]
    assert text_of(client, extra_body={"stop_token_ids": [ord(first)]}) == ""
    assert text_of(client, logit_bias={"33": 100}) == "!" * 8
    assert text_of(client, logit_bias={"33": 100}, frequency_penalty=2, presence_penalty=2, max_tokens=64) != "!" * 64


def test_chats_stream_and_count(client: openai.OpenAI) -> None:
    asked: Any = {"model": "default", "messages": MESSAGES, "max_tokens": 12, "seed": 3}
    whole = client.chat.completions.create(**asked, n=2)
    texts = {0: "", 1: ""}
    usage = None
    for chunk in client.chat.completions.create(**asked, n=2, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert [choice.message.content for choice in whole.choices] == list(texts.values())
    assert usage is not None
    assert whole.usage is not None
    assert usage.total_tokens == whole.usage.total_tokens


def test_answers_have_the_form_that_was_asked_for(client: openai.OpenAI) -> None:
    regex = {"type": "regex", "pattern": "(ab){2,3}!"}
    assert text_of(client, model="ending", extra_body={"response_format": regex}) in ("abab!", "ababab!")
    schema = {
        "type": "object",
        "properties": {"a": {"type": "boolean"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    form: Any = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    asked: Any = {"model": "ending", "messages": MESSAGES, "max_tokens": 60, "seed": 3}
    chat = client.chat.completions.create(**asked, response_format=form)
    content = chat.choices[0].message.content
    assert content is not None
    assert json.loads(content) in ({"a": True}, {"a": False})
    with pytest.raises(openai.BadRequestError) as refused:
        text_of(client, model="ending", extra_body={"response_format": {"type": "regex", "pattern": "("}})
    assert refused.value.param == "response_format"


MIXED: list[dict[str, Any]] = [
    {}, {"temperature": 1, "top_p": 0.5}, {"temperature": 1, "extra_body": {"top_k": 5}}, {"n": 3, "temperature": 1},
    {"temperature": 1, "extra_body": {"min_p": 0.2, "repetition_penalty": 1.3}}, {"best_of": 4, "temperature": 1},
    {"presence_penalty": 1.5, "frequency_penalty": -1}, {"logit_bias": {"65": 5, "66": 5}}, {"echo": True, "stop": "!"},
    {"model": "ending", "extra_body": {"response_format": {"type": "regex", "pattern": "[a-z]{3,9}"}}},
]  # fmt: skip


def test_answers_do_not_depend_on_their_company(client: openai.OpenAI) -> None:
    asked = [
        {
            **GREEDY,
            "prompt": "To be " * (number % 5 + 1),
            "max_tokens": 20 + number,
            "seed": number,
            **MIXED[number % 10],
        }
        for number in range(40)
    ]

    def texts(settings: dict[str, Any]) -> list[str]:
        return [choice.text for choice in client.completions.create(**settings).choices]

    with ThreadPoolExecutor(20) as clients:
        together = list(clients.map(texts, asked))
    assert together == [texts(settings) for settings in asked]


def test_texts_are_embedded(client: openai.OpenAI) -> None:
    answer = client.embeddings.create(model="tiny", input=["To be", "or not", "To be"])
    first, second, third = (item.embedding for item in answer.data)
    assert len(first) == 16
    assert first == pytest.approx(third, abs=1e-6)
    assert first != pytest.approx(second, abs=1e-3)
    assert answer.usage.total_tokens == 16
    assert client.embeddings.create(model="tiny", input=list(b"To be")).data[0].embedding == pytest.approx(first)
    with pytest.raises(openai.BadRequestError):
        client.embeddings.create(model="tiny", input="x" * 1000)


def test_answers_in_the_background_are_the_same(client: openai.OpenAI, address: str) -> None:
    asked = {**GREEDY, "n": 2, "logprobs": 1}
    live = httpx.post(f"{address}/v1/completions", json=asked).json()
    promised = httpx.post(f"{address}/v1/completions", json={**asked, "background": True})
    assert promised.status_code == 202
    fetched = httpx.get(f"{address}/v1/completions/{promised.json()['id']}", params={"wait": 30}, timeout=40).json()
    assert fetched["status"] == "completed"
    assert fetched["choices"] == live["choices"]
    assert fetched["usage"]["total_tokens"] == live["usage"]["total_tokens"]


def test_the_other_shapes_say_the_same(client: openai.OpenAI, address: str) -> None:
    text = text_of(client, prompt="To be", max_tokens=8)
    query = {"model": "tiny", "prompt": "To be", "max_tokens": 8, "temperature": 0, "n": 1}
    answer = httpx.post(f"{address}/completions", params=query)
    assert answer.json()["choices"][0]["text"] == "To be" + text
    answer = httpx.post(f"{address}/api/generate", json={"prompt": "To be", "max_tokens": 8, "temperature": 0})
    assert answer.json() == {"success": True, "text": "To be" + text}


def figure(address: str, *parts: str) -> float:
    """The sum of all series whose names and labels have these parts."""
    lines = [line for line in httpx.get(f"{address}/metrics").text.splitlines() if not line.startswith("#")]
    return sum(float(line.split()[-1]) for line in lines if all(part in line for part in parts))


def leave_after_a_piece(address: str, number: int) -> None:
    """Hang up in the middle of an answer that would take long; every third one asks for several at once."""
    prompt = f"{number} " + "to be or not " * (number % 4)
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 50_000, "stream": True, "n": 1 + 2 * (number % 3 == 0)}
    with httpx.stream("POST", f"{address}/v1/completions", json=body, timeout=120) as answer:
        assert answer.status_code == 200
        if number % 2:
            next(answer.iter_bytes())


@pytest.mark.slow
def test_200_clients_that_leave_leave_nothing_behind(client: openai.OpenAI, address: str) -> None:
    expected = text_of(client)
    with ThreadPoolExecutor(40) as clients:
        list(clients.map(partial(leave_after_a_piece, address), range(200)))
    eventually(lambda: figure(address, "smelt_worker_sequences{") == 0, "an idle worker")
    eventually(lambda: figure(address, "smelt_engine_blocks{", 'state="used"') == 0, "an empty cache")
    assert figure(address, "smelt_engine_blocks{", 'state="free"') > 0
    assert figure(address, "smelt_answers_total{", 'reason="left"') >= 100
    assert text_of(client) == expected
