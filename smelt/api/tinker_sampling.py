"""Tinker's samplers: opened, shown, and asked for samples; draws nothing."""

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from smelt.api.services import Services
from smelt.api.streaming import json_body
from smelt.api.tinker_answers import add_direct, aside, owner_of, promise
from smelt.api.tinker_types import SampleBody, SamplingSessionBody, sample, understand
from smelt.control.samplers import weights_of

MAX_PROMPT_BYTES = 2**24


def add_routes(routes: APIRouter, services: Services) -> None:
    """The routes of samplers."""
    samplers = services.post_training.samplers

    async def asample(request: Request) -> Response:
        """Samples from a prompt; a seed that is not given is drawn now."""
        raw = await json_body(request, MAX_PROMPT_BYTES)
        body = await aside(raw, understand, SampleBody, raw)
        sampler = await samplers.find(owner_of(request), body.sampling_session_id)
        wanted = await aside(raw, sample, body, weights_of(sampler))
        to_the_end = body.sampling_params.max_tokens is None
        promised = await samplers.sample(sampler, body.seq_id, wanted, body.meant(), to_the_end=to_the_end)
        return promise(promised, sample_sequence_ids=[f"{promised}-{index}" for index in range(body.num_samples)])

    add_direct(routes, services.abuse_checker, "/asample", asample, SampleBody)

    @routes.post("/create_sampling_session")
    async def create_sampling_session(request: Request, body: SamplingSessionBody) -> dict[str, Any]:
        """Open a sampler of a base model, or of saved weights."""
        sampler_id = await samplers.create(
            owner_of(request),
            body.session_id,
            body.sampling_session_seq_id,
            body.base_model,
            body.model_path,
        )
        return {"type": "create_sampling_session", "sampling_session_id": sampler_id}

    @routes.get("/samplers/{sampler_id}")
    async def show_sampler(request: Request, sampler_id: str) -> dict[str, Any]:
        """What a sampler draws from."""
        sampler = await samplers.find(owner_of(request), sampler_id)
        return {"sampler_id": sampler.id, "base_model": sampler.base_model, "model_path": sampler.path}
