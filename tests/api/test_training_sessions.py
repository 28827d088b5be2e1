"""Sessions as people look at them, over HTTP: whose they are, how far, what is told of them, and changes as events."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from noted_session import NotedSession
from scripted_training import training_server
from smelt.api.services import Services


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, Services]]:
    with training_server(tmp_path / "home") as (url, _, services):
        yield url, services


@pytest.fixture
def session(server: tuple[str, Services]) -> tuple[str, str]:
    """(session, model) ids of a session with a model in training."""
    with httpx.Client(base_url=f"{server[0]}/api/v1") as client:
        asked = {"tags": ["t"], "user_metadata": {}, "sdk_version": "0.38.0", "display_name": "my talk"}
        session_id = client.post("/create_session", json=asked).raise_for_status().json()["session_id"]
        lora = {"rank": 8, "seed": 1, "train_unembed": True, "train_mlp": True, "train_attn": True}
        asked = {"session_id": session_id, "model_seq_id": 0, "base_model": "tiny", "lora_config": lora}
        made = client.post("/create_model", json=asked).raise_for_status().json()
        client.post("/retrieve_future", json={"request_id": made["request_id"]}).raise_for_status()
    return session_id, f"{session_id}:train:0"


def events(lines: Iterator[str], kinds: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """(kind, data) of those events of a stream."""
    kind = ""
    for line in lines:
        name, _, value = line.partition(": ")
        if name == "event":
            kind = value
        elif name == "data" and kind in kinds:
            yield kind, json.loads(value)


def test_sessions_are_listed_with_their_models(server: tuple[str, Services], session: tuple[str, str]) -> None:
    [listed] = httpx.get(f"{server[0]}/v1/sessions").json()["data"]
    assert httpx.get(f"{server[0]}/v1/sessions/{session[0]}").json() == listed
    assert (listed["id"], listed["name"], listed["standing"], listed["tags"]) == (
        session[0],
        "my talk",
        "active",
        ["t"],
    )
    assert (listed["num_waiting"], listed["num_samplers"]) == (0, 0)
    [model] = listed["models"]
    assert (model["id"], model["base_model"], model["rank"], model["is_open"]) == (session[1], "tiny", 8, True)
    assert (model["step"], model["last"], model["spark"]) == (0, None, [])


def test_what_a_client_tells_belongs_to_the_step_it_takes_next(
    server: tuple[str, Services], session: tuple[str, str]
) -> None:
    url, services = server
    place = f"{url}/v1/sessions/{session[0]}/models/{session[1]}/figures"
    assert httpx.post(place, json={"figures": {"reward": 0.25}}).status_code == 202
    client = NotedSession(services.post_training.figures, session[1])
    client.step()
    assert httpx.post(place, json={"figures": {"reward": 0.5, "length": 7}}).status_code == 202
    client.step()
    services.post_training.figures.close()
    curves = httpx.get(f"{url}/v1/sessions/{session[0]}/figures").json()["data"]
    assert [step["told"] for step in curves[session[1]]] == [{"reward": 0.25}, {"reward": 0.5, "length": 7}]
    [model] = httpx.get(f"{url}/v1/sessions/{session[0]}").json()["models"]
    assert (model["step"], model["last"]["told"]["reward"], model["last"]["grad_norm"]) == (2, 0.5, 2.0)


@pytest.mark.parametrize(
    ("figures", "status"),
    [({"reward": "high"}, 422), ({"x" * 65: 1}, 400), ({str(n): 1 for n in range(33)}, 400), ({"a": 10**400}, 422)],
)
def test_what_is_no_figure_is_refused(
    server: tuple[str, Services], session: tuple[str, str], figures: dict[str, Any], status: int
) -> None:
    place = f"{server[0]}/v1/sessions/{session[0]}/models/{session[1]}/figures"
    assert httpx.post(place, json={"figures": figures}).status_code == status


def test_others_sessions_are_not_there(server: tuple[str, Services], session: tuple[str, str]) -> None:
    for path in ("none", "none/figures", "none/events"):
        assert httpx.get(f"{server[0]}/v1/sessions/{path}").status_code == 404
    asked = {"figures": {"reward": 1}}
    assert httpx.post(f"{server[0]}/v1/sessions/{session[0]}/models/x/figures", json=asked).status_code == 404
    place = f"{server[0]}/v1/sessions/none/models/{session[1]}/figures"
    assert httpx.post(place, json=asked).status_code == 400


def test_changes_come_as_events(server: tuple[str, Services], session: tuple[str, str]) -> None:
    url, services = server
    with httpx.stream("GET", f"{url}/v1/sessions/events", timeout=30) as all_of_them:
        changes = events(all_of_them.iter_lines(), ("sessions",))
        assert [each["id"] for each in next(changes)[1]] == [session[0]]
        with httpx.stream("GET", f"{url}/v1/sessions/{session[0]}/events", timeout=30) as one:
            told = events(one.iter_lines(), ("session", "curves", "steps"))
            assert next(told)[1]["models"][0]["step"] == 0
            assert next(told) == ("curves", {session[1]: []})
            NotedSession(services.post_training.figures, session[1]).step()
            kind, view = next(told)
            assert (kind, view["models"][0]["step"]) == ("session", 1)
            kind, added = next(told)
            assert (kind, [step["step"] for step in added[session[1]]]) == ("steps", [1])
        assert next(changes)[1][0]["models"][0]["step"] == 1
