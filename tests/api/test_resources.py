"""Runs and workers over HTTP: what each route answers, to whom, and the stream of a run's events on a real socket."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from live import serving, with_caller
from scripted import scripted
from smelt.api import failures, resources
from smelt.api.services import Services
from smelt.configs import RUN_LOG, RUN_METRICS
from smelt.control import run_changes
from smelt.control.keys import LOCAL, Caller
from smelt.control.model_server import WorkerInfo
from smelt.control.run_folders import register
from smelt.run_configs import TrainConfig

EVE = Caller("eve", "key", frozenset({"training"}))
WORKER = WorkerInfo("here:1", 1, "cpu", ("nano",), 0, 0)


@pytest.fixture
def services(tmp_path: Path) -> Iterator[Services]:
    with scripted(tmp_path / "home") as (services, models):
        models.workers = [WORKER]
        yield services


@pytest.fixture
def app(services: Services) -> FastAPI:
    app = FastAPI()
    failures.install(app)
    app.include_router(resources.router(services))
    return app


@pytest.fixture
def client(app: FastAPI) -> TestClient:
    return TestClient(with_caller(app, LOCAL))


@pytest.fixture
def run(services: Services, tmp_path: Path) -> tuple[str, Path]:
    """A run of a terminal with three steps: its id and folder."""
    out_dir = tmp_path / "out"
    out_dir.mkdir()
    (out_dir / RUN_METRICS).write_text("".join(step(number) for number in (1, 2, 3)))
    (out_dir / RUN_LOG).write_text("one\ntwo\nthree\n")
    return register(TrainConfig(out_dir=str(out_dir)), services.settings.runs).id, out_dir


def step(number: int) -> str:
    return json.dumps({"kind": "step", "step": number, "loss": 1.0 / number, "grad_norm": None}) + "\n"


def next_event(lines: Iterator[str], kind: str) -> tuple[str, Any]:
    """The id and data of the next event of a kind."""
    event: dict[str, str] = {}
    for line in lines:
        if line == "" and event.get("event") == kind:
            return event.get("id", ""), json.loads(event["data"])
        if line == "":
            event = {}
        elif not line.startswith(":"):
            name, _, value = line.partition(": ")
            event[name] = value
    raise AssertionError(f"the stream ended without {kind}")


def test_a_run_has_a_list_a_page_curves_and_a_log(client: TestClient, run: tuple[str, Path]) -> None:
    run_id, out_dir = run
    (listed,) = client.get("/v1/runs").json()["data"]
    assert (listed["id"], listed["state"], listed["step"], listed["spark"]) == (run_id, "failed", 3, [1, 0.5, 1 / 3])
    shown = client.get(f"/v1/runs/{run_id}").json()
    assert shown.items() >= listed.items()
    assert shown["config"]["out_dir"] == str(out_dir)
    assert shown["command_line"].startswith("smelt train ")
    curves = client.get(f"/v1/runs/{run_id}/metrics").json()
    assert curves["train"]["step"] == [1, 2, 3]
    assert curves["train"]["grad_norm"] == [None, None, None]
    assert client.get(f"/v1/runs/{run_id}/log?lines=2").json()["lines"] == ["two", "three"]


def test_what_is_not_there_is_404_and_what_is_wrong_is_named(client: TestClient, run: tuple[str, Path]) -> None:
    for path in ("", "/metrics", "/log", "/events"):
        response = client.get(f"/v1/runs/run-000000000000{path}")
        assert (response.status_code, "run-000000000000" in response.json()["detail"]) == (404, True)
    assert client.post("/v1/runs/run-000000000000/cancel").status_code == 404
    assert client.get(f"/v1/runs/{run[0]}/log?lines=0").status_code == 422
    assert client.post("/v1/runs", json={"data_path": "/etc/passwd"}).status_code == 400
    assert client.post("/v1/runs", json=[1]).status_code == 400


def test_somebody_elses_run_looks_like_none(app: FastAPI, client: TestClient, run: tuple[str, Path]) -> None:
    eve = TestClient(with_caller(app, EVE))
    assert eve.get("/v1/runs").json() == {"data": []}
    for path in ("", "/metrics", "/log", "/events"):
        missing = eve.get(f"/v1/runs/run-000000000000{path}").json()["detail"]
        response = eve.get(f"/v1/runs/{run[0]}{path}")
        assert response.status_code == 404
        assert response.json()["detail"].replace(run[0], "run-000000000000") == missing
    hers = eve.post("/v1/runs", json={"data_path": "builtin:pydoc"}).json()
    assert [status["owner"] for status in eve.get("/v1/runs").json()["data"]] == ["eve"]
    assert [status["id"] for status in client.get("/v1/runs").json()["data"]] == [hers["id"], run[0]]  # an admin's list


def test_a_run_is_asked_for_and_taken_back(client: TestClient) -> None:
    created = client.post("/v1/runs", json={"data_path": "builtin:pydoc", "max_iters": 5})
    assert (created.status_code, created.json()["state"]) == (201, "queued")
    cancelled = client.post(f"/v1/runs/{created.json()['id']}/cancel")
    assert (cancelled.status_code, cancelled.json()["state"]) == (200, "cancelled")


def test_workers_are_listed(client: TestClient) -> None:
    (worker,) = client.get("/v1/workers").json()["data"]
    assert (worker["name"], worker["models"]) == ("here:1", ["nano"])


def test_a_stream_tells_what_is_new_and_goes_on_where_its_reader_was(app: FastAPI, run: tuple[str, Path]) -> None:
    run_id, out_dir = run
    with serving(with_caller(app, LOCAL)) as url, httpx.Client(base_url=url, timeout=10) as client:
        with client.stream("GET", f"/v1/runs/{run_id}/events") as response:
            assert response.headers["content-type"].startswith("text/event-stream")
            assert response.headers["cache-control"] == "no-cache"
            lines = response.iter_lines()
            assert next_event(lines, "state")[1]["step"] == 3
            with (out_dir / RUN_METRICS).open("a") as file:
                file.write(step(4))
            cursor, events = next_event(lines, "metrics")
            assert [event["step"] for event in events] == [4]
        with (out_dir / RUN_METRICS).open("a") as file:
            file.write(step(5))
        with client.stream("GET", f"/v1/runs/{run_id}/events", headers={"last-event-id": cursor}) as response:
            assert [event["step"] for event in next_event(response.iter_lines(), "metrics")[1]] == [5]
        with client.stream("GET", f"/v1/runs/{run_id}/events", params={"after": cursor}) as response:
            assert [event["step"] for event in next_event(response.iter_lines(), "metrics")[1]] == [5]


def test_the_list_streams_too_and_silence_is_a_comment(
    app: FastAPI, run: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_changes, "SILENCE_S", 0.05)
    with (
        serving(with_caller(app, LOCAL)) as url,
        httpx.stream("GET", f"{url}/v1/runs/events", timeout=10) as response,
    ):
        lines = response.iter_lines()
        assert [status["id"] for status in next_event(lines, "runs")[1]] == [run[0]]
        assert next(line for line in lines if line) == ": still here"


def test_every_route_is_in_the_openapi_document_with_what_it_answers(app: FastAPI) -> None:
    document = app.openapi()
    assert set(document["paths"]) == {
        "/v1/runs", "/v1/runs/events", "/v1/runs/{run_id}", "/v1/runs/{run_id}/metrics", "/v1/runs/{run_id}/log",
        "/v1/runs/{run_id}/events", "/v1/runs/{run_id}/cancel", "/v1/runs/{run_id}/resume",
        "/v1/runs/{run_id}/checkpoints", "/v1/recipes", "/v1/workers",
    }  # fmt: skip
    assert all(operation["description"] for path in document["paths"].values() for operation in path.values())
    assert "RunDetails" in document["components"]["schemas"]


def test_a_run_starts_again_by_the_yaml_that_its_page_shows(client: TestClient) -> None:
    asked = {"data_path": "builtin:pydoc", "max_iters": 7, "betas": [0.8, 0.9], "tokenizer": "bytes"}
    first = client.post("/v1/runs", json=asked).json()
    yaml_type = {"content-type": "application/yaml"}
    again = client.post("/v1/runs", content=first["config_yaml"], headers=yaml_type)
    assert again.status_code == 201, again.text
    assert again.json()["config"] == {**first["config"], "out_dir": again.json()["out_dir"]}
    for text, words in (("a: [", "not valid YAML"), ("- a", "must be a mapping"), ("n-layers: 3", "n_layers")):
        assert words in client.post("/v1/runs", content=text, headers=yaml_type).json()["detail"]
    assert client.post("/v1/runs", content="a=1", headers={"content-type": "text/plain"}).status_code == 415


def test_the_recipes_say_what_a_config_may_hold(client: TestClient) -> None:
    recipes = {recipe["name"]: recipe for recipe in client.get("/v1/recipes").json()["data"]}
    assert {"pretrain", "fine-tune", "classify"} <= recipes.keys()
    for recipe in recipes.values():
        fields = {name for names in recipe["sections"].values() for name in names}
        assert fields <= recipe["json_schema"]["properties"].keys()
        assert "out_dir" not in fields
