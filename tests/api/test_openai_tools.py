"""OpenAI's client against a served model that has learned one call of a function, by its own chat template."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from chat_templates import QWEN_3, TOOL, write_tokenizer
from serving import serving
from smelt.data.chat_format import ChatFormat
from smelt.data.tokenizers import load_tokenizer
from smelt.types import ChatMessage

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

QUESTION = "Weather?"
ANSWER = 'Hm.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Köln"}}\n</tool_call>'
ASKED: Any = {
    "model": "m", "messages": [{"role": "user", "content": QUESTION}], "tools": [TOOL], "temperature": 0,
    "max_tokens": 200,
}  # fmt: skip


def write_model(folder: Path) -> None:
    """A small model that has learned by heart what to answer to the question, and to end its turn."""
    write_tokenizer(folder, QWEN_3)
    tokenizer = load_tokenizer(folder)
    prompt_ids = ChatFormat.of(folder, tokenizer).prompt_ids([ChatMessage("user", QUESTION)], [TOOL])
    turn_end = next(iter(ChatFormat.of(folder, tokenizer).stop_token_ids))
    answer_ids = [*tokenizer.encode(ANSWER), turn_end]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=288, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=1024,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    ids = torch.tensor([prompt_ids + answer_ids])
    labels = ids.clone()
    labels[:, : len(prompt_ids)] = -100
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    loss = torch.tensor(1.0)
    while loss > 0.02:
        loss = model(ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    folder = tmp_path_factory.mktemp("tools")
    write_model(folder / "m")
    with (
        serving(folder / "home", str(folder / "m")) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=2) as client,
    ):
        yield client


def test_a_call_comes_as_a_call(client: openai.OpenAI) -> None:
    (choice,) = client.chat.completions.create(**ASKED).choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is not None
    assert choice.message.content.strip() == "Hm."
    assert choice.message.tool_calls is not None
    (call,) = choice.message.tool_calls
    assert call.type == "function"
    assert (call.function.name, call.function.arguments) == ("get_weather", '{"city": "Köln"}')


def test_a_stream_shows_what_is_said_and_then_the_call(client: openai.OpenAI) -> None:
    content, name, arguments, reasons = "", "", "", []
    for chunk in client.chat.completions.create(**ASKED, stream=True):
        (choice,) = chunk.choices
        content += choice.delta.content or ""
        for call in choice.delta.tool_calls or ():
            assert call.function is not None
            name += call.function.name or ""
            arguments += call.function.arguments or ""
        reasons.append(choice.finish_reason)
    assert (content.strip(), name, arguments) == ("Hm.", "get_weather", '{"city": "Köln"}')
    assert [reason for reason in reasons if reason] == ["tool_calls"]


def test_what_was_called_and_its_result_can_be_told(client: openai.OpenAI) -> None:
    (choice,) = client.chat.completions.create(**ASKED).choices
    turns = [choice.message, {"role": "tool", "tool_call_id": choice.message.tool_calls[0].id, "content": "3 °C"}]
    answer = client.chat.completions.create(**{**ASKED, "messages": [*ASKED["messages"], *turns], "max_tokens": 5})
    assert answer.usage is not None
    assert answer.usage.prompt_tokens > 300


def test_a_call_that_has_to_come_comes_whatever_was_learned(client: openai.OpenAI) -> None:
    clock: Any = {"type": "function", "function": {"name": "clock", "parameters": {
        "properties": {"utc": {"type": "boolean"}}, "required": ["utc"], "additionalProperties": False}}}  # fmt: skip
    by_name = {"type": "function", "function": {"name": "clock"}}
    for choice, names in (("required", {"get_weather", "clock"}), (by_name, {"clock"})):
        asked = {**ASKED, "tools": [TOOL, clock], "tool_choice": choice}
        (whole,) = client.chat.completions.create(**asked).choices
        with client.chat.completions.stream(**asked) as stream:
            streamed = stream.get_final_completion().choices[0]
        for told in (whole, streamed):
            assert told.finish_reason == "tool_calls"
            assert not told.message.content
            assert told.message.tool_calls is not None
            (call,) = told.message.tool_calls
            assert call.type == "function"
            assert call.function.name in names
            arguments = json.loads(call.function.arguments)
            assert isinstance(arguments.get("utc" if call.function.name == "clock" else "city"), bool | str)
