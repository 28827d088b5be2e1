"""POST /sample and /generate: texts of a base model or of an adapter as it is now, by plain HTTP; computes nothing.

Parameters and their bounds are those of OpenAI's API; the defaults are others.
"""

from functools import partial
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from smelt.api.openai import MAX_BODY_BYTES, chat_call, text_call
from smelt.api.openai_chat_types import ChatBody
from smelt.api.openai_desk import Call, Desk
from smelt.api.openai_parsing import parse
from smelt.api.openai_types import ALTERNATIVES, CompletionBody
from smelt.api.services import Services
from smelt.api.streaming import json_body
from smelt.api.tinker_answers import add_direct, encoded, owner_of
from smelt.api.tinker_types import PromptBody, TinkerBody, understand
from smelt.errors import InvalidInput, UnknownAdapter, UnknownModel
from smelt.models.aliases import DEFAULT
from smelt.storage.records import TrainingModel
from smelt.transport.messages import Completion

DEFAULTS = {"max_tokens": 50, "temperature": 1.0, "top_p": 1.0, "top_k": 50}
NAMES = (*DEFAULTS, "stop", "seed")


class SampleTextBody(TinkerBody):
    """Write on from texts, tokens or a conversation. `model_id` is an adapter; without one the base model writes."""

    model_id: Annotated[str | None, Field(min_length=1)] = None
    base_model: str = DEFAULT
    prompts: list[str] | None = None
    prompt: str | PromptBody | None = None
    messages: list[Any] | None = None
    sampling_params: dict[str, Any] = {}

    def params(self) -> dict[str, Any]:
        """By OpenAI's names. InvalidInput for what we do not know."""
        given = {name: value for name, value in self.sampling_params.items() if value is not None}
        if unknown := sorted(given.keys() - set(NAMES)):
            raise InvalidInput(
                f"unknown sampling_params.{unknown[0][:60]}; known: {', '.join(NAMES)}", "sampling_params"
            )
        if given.get("top_k", 1) in (-1, 0):  # every token, as Tinker says it
            del given["top_k"]
            return {name: value for name, value in (DEFAULTS | given).items() if name != "top_k"}
        return DEFAULTS | given

    def texts(self) -> list[Any]:
        """Prompts as texts, or as tokens. InvalidInput where there are none, or they are given twice."""
        given = [self.prompts, self.prompt, self.messages]
        if sum(each is not None for each in given) != 1:
            raise InvalidInput("give one of prompts, prompt and messages", "prompts")
        if isinstance(self.prompt, PromptBody):
            return [[token for chunk in self.prompt.chunks for token in chunk.tokens]]
        return [self.prompt] if self.prompt is not None else list(self.prompts or ())


def add_routes(routes: APIRouter, services: Services) -> None:
    """Both paths, which are the same."""

    async def sample(request: Request) -> Response:
        """Write on from each prompt, once."""
        body = understand(SampleTextBody, await json_body(request, MAX_BODY_BYTES))
        model = await _adapter(services, owner_of(request), body.model_id)
        call = await _call(services, request, body, model)
        if model is not None:
            folder = (await services.adapters.to_sample_from(model)).folder
            call = Call(call.head, call.body, [msgspec.structs.replace(each, adapter=folder) for each in call.requests])
        completions = await Desk(services.completions, partial(_understood, call)).write(request)
        return encoded(_answer(body.model_id or call.head.model, completions))

    for path in ("/sample", "/generate"):
        add_direct(routes, services.abuse_checker, path, sample, SampleTextBody)


async def _adapter(services: Services, owner: str, name: str | None) -> TrainingModel | None:
    """The adapter of that name; None where it is the name of a base model. UnknownAdapter."""
    if name is None:
        return None
    try:
        return await services.adapters.find(owner, name)
    except UnknownAdapter:
        try:
            await services.catalogue.find(name)
        except UnknownModel:
            raise UnknownAdapter(f"there is neither an adapter nor a model {name[:200]!r}") from None
    return None


async def _call(services: Services, request: Request, body: SampleTextBody, model: TrainingModel | None) -> Call:
    asked = {"model": (body.model_id or body.base_model) if model is None else model.served_model, **body.params()}
    caller, texts = request.state.caller, body.texts()
    if body.messages is not None:
        chat = msgspec.json.encode({**asked, "messages": body.messages, "logprobs": True})
        return await chat_call(services.catalogue, parse(ChatBody, chat, ALTERNATIVES), caller)
    text = msgspec.json.encode({**asked, "prompt": texts, "logprobs": 0})
    return await text_call(services.catalogue, parse(CompletionBody, text, ALTERNATIVES), caller)


async def _understood(call: Call, _request: Request) -> Call:
    return call


def _answer(name: str, completions: list[Completion]) -> dict[str, Any]:
    return {
        "model_id": name,
        "generated_text": completions[0].text,
        "completions": [completion.text for completion in completions],
        "sequences": [
            {
                "tokens": [each.token_id for each in completion.logprobs],
                "logprobs": [each.logprob for each in completion.logprobs],
                "stop_reason": completion.reason,
            }
            for completion in completions
        ],
    }
