"""Requests that go past FastAPI: found by their paths, and answered as if they had not."""

import re
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest
from fastapi import FastAPI
from httpx import Response

from gated import client_of, services_in
from smelt.api.app import create_app, create_routes
from smelt.api.gate import Gate
from smelt.api.services import Services
from smelt.api.sessions import Sessions
from smelt.api.shortcuts import Shortcuts
from smelt.control.keyring import KeyRing

pytestmark = pytest.mark.anyio

TINKER = ("/api/v1/forward_backward", "/api/v1/optim_step", "/api/v1/retrieve_future")
OPENAI = ("/v1/chat/completions", "/v1/completions")
BODIES = (b"", b"{", b"{}", b"[]", b"\xff")
TYPES = ("application/json", "application/x-protobuf")


@pytest.fixture
def services(tmp_path: Path) -> Iterator[Services]:
    with services_in(tmp_path / "home") as services:
        yield services


def gated(services: Services, has_shortcuts: bool) -> Gate:
    ring, sessions = KeyRing(services.database), Sessions(services.settings.home)
    app = create_routes(services, ring, sessions)
    return Gate(Shortcuts(app) if has_shortcuts else app, services.settings, ring, sessions)


def told(answer: Response) -> tuple[int, str, dict[str, str]]:
    headers = {name: value for name, value in answer.headers.items() if name != "x-request-id"}
    return answer.status_code, re.sub(r"\(request \w+\)", "", answer.text), headers


async def test_what_is_asked_most_goes_past_the_rest(services: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse(*_: object) -> None:
        raise AssertionError("FastAPI was asked")

    monkeypatch.setattr(FastAPI, "__call__", refuse)
    async with client_of(create_app(services)) as client:
        for path in (*TINKER, *OPENAI):
            assert (await client.post(path, content=b"{")).status_code in (400, 415)
        assert (await client.get("/v1/models")).status_code == 500


async def test_an_error_is_told_of_in_the_same_words(services: Services) -> None:
    async with client_of(gated(services, True)) as short, client_of(gated(services, False)) as long:
        for path, body, content_type in product((*TINKER, *OPENAI), BODIES, TYPES):
            asked = {"content": body, "headers": {"content-type": content_type}}
            answer = await short.post(path, **asked)
            assert told(answer) == told(await long.post(path, **asked)), (path, body, content_type)
            assert answer.status_code >= 400


async def test_other_methods_and_paths_take_the_usual_way(services: Services) -> None:
    async with client_of(gated(services, True)) as short, client_of(gated(services, False)) as long:
        for method, path in product(("GET", "PUT", "HEAD", "OPTIONS"), (TINKER[0], OPENAI[0])):
            assert told(await short.request(method, path)) == told(await long.request(method, path))
        for path in (f"{TINKER[1]}/", f"{OPENAI[1]}x"):
            assert told(await short.post(path)) == told(await long.post(path))
