"""/predict by raw HTTP: shapes, limits, and what is refused."""

from pathlib import Path
from typing import Any

import httpx
import pytest

from classifiers import save_small_classifier
from scripted import Scripted
from smelt.api.classification import MAX_CHARS, MAX_TEXTS
from smelt.api.services import Services
from smelt.errors import Overloaded

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(60)]


@pytest.fixture
def news(services: Services) -> Path:
    folder = services.settings.models / "news"
    save_small_classifier(folder)
    return folder


async def test_a_text_and_several(client: httpx.AsyncClient, model_server: Scripted, news: Path) -> None:
    answer = await client.post("/predict", json={"text": "abcd"})
    assert (answer.status_code, answer.json()) == (
        200,
        {"label": "long", "confidence": 0.5, "all_probabilities": {"long": 0.5, "short": 0.5}},
    )
    answer = await client.post("/predict/batch", json={"texts": ["abcde", "ab"], "model": "news"})
    assert answer.json() == [
        {"label": "long", "confidence": 0.6667, "all_probabilities": {"long": 0.6667, "short": 0.3333}},
        {"label": "short", "confidence": 1.0, "all_probabilities": {"long": 0.0, "short": 1.0}},
    ]
    assert [request.texts for request in model_server.classified] == [("abcd",), ("abcde", "ab")]
    assert {(request.model, request.owner) for request in model_server.classified} == {("news", "local")}


async def test_limits_are_in_characters_and_nothing_is_echoed(client: httpx.AsyncClient, news: Path) -> None:
    longest = "\U0001f600" * MAX_CHARS
    assert (await client.post("/predict", json={"text": longest})).status_code == 200
    wrong: list[tuple[str, Any, list[Any]]] = [
        ("", {"text": longest + "secret"}, ["body", "text"]),
        ("", {"text": ""}, ["body", "text"]),
        ("", {"text": " \n"}, ["body", "text"]),
        ("", {"text": 7}, ["body", "text"]),
        ("", {}, ["body", "text"]),
        ("", {"text": "secret", "colour": 1}, ["body", "colour"]),
        ("", {"text": "secret", "model": 7}, ["body", "model"]),
        ("/batch", {"texts": []}, ["body", "texts"]),
        ("/batch", {"texts": ["secret"] * (MAX_TEXTS + 1)}, ["body", "texts"]),
        ("/batch", {"texts": ["secret", 7]}, ["body", "texts", 1]),
        ("/batch", {"texts": ["secret", "x" * (MAX_CHARS + 1)]}, ["body", "texts", 1]),
        ("/batch", {"texts": "secret"}, ["body", "texts"]),
    ]
    for path, body, place in wrong:
        answer = await client.post(f"/predict{path}", json=body)
        assert (answer.status_code, answer.json()["detail"][0]["loc"]) == (422, place)
        assert "secret" not in answer.text
        assert len(answer.text) < 1000
    answer = await client.post("/predict", content=b'{"text": "\\ud800"}', headers={"content-type": "application/json"})
    assert answer.status_code == 422
    answer = await client.post("/predict", content=b"{", headers={"content-type": "application/json"})
    assert answer.status_code == 422


async def test_without_a_classifier(client: httpx.AsyncClient) -> None:
    answer = await client.post("/predict", json={"text": "a"})
    assert answer.status_code == 503
    assert "smelt train-classifier" in answer.json()["detail"]
    answer = await client.post("/predict", json={"text": "a", "model": "tiny"})
    assert (answer.status_code, "has no labels" in answer.json()["detail"]) == (400, True)
    answer = await client.post("/predict", json={"text": "a", "model": "gone"})
    assert answer.status_code == 404


async def test_which_of_several_must_be_said(client: httpx.AsyncClient, services: Services, news: Path) -> None:
    save_small_classifier(services.settings.models / "spam", ("ham", "spam"))
    answer = await client.post("/predict", json={"text": "a"})
    assert (answer.status_code, "news, spam" in answer.json()["detail"]) == (400, True)
    assert (await client.post("/predict", json={"text": "a", "model": "spam"})).status_code == 200
    cards = {card["id"]: card for card in (await client.get("/v1/models")).json()["data"]}
    assert cards["spam"]["labels"] == ["ham", "spam"]
    assert cards["tiny"]["labels"] is None


async def test_what_goes_wrong_has_a_status(
    client: httpx.AsyncClient, model_server: Scripted, news: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(_request: object) -> None:
        raise Overloaded("512 requests wait for news already; try again in a moment", 5)

    monkeypatch.setattr(model_server, "classify", refuse)
    answer = await client.post("/predict", json={"text": "a"})
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "5")
