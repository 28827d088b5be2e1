"""What is counted and what is written down: routes by template, and nothing that looks like a key."""

import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from gated import client_of, make_key, services_in
from smelt.api import telemetry
from smelt.api.app import create_app
from smelt.api.services import Services
from smelt.api.telemetry import Durations
from smelt.control.model_server import WorkerInfo
from smelt.types import ModelLoad


@pytest.fixture
def services(tmp_path: Path) -> Iterator[Services]:
    with services_in(tmp_path / "home") as services:
        yield services


def lines_of(log_file: io.StringIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in log_file.getvalue().splitlines()]


def value(exposition: str, series: str) -> float:
    return float(next((line.split()[-1] for line in exposition.splitlines() if line.startswith(series)), "0"))


@pytest.mark.anyio
async def test_requests_are_counted_under_their_templates(services: Services) -> None:
    async with client_of(create_app(services)) as client:
        before = (await client.get("/metrics")).text
        for path in ("/v1/runs/a", "/v1/runs/b", "/nowhere/1", "/nowhere/2"):
            assert (await client.get(path)).status_code == 404
        answer = await client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    runs = 'smelt_http_requests_total{method="GET",route="/v1/runs/{run_id}",status="404"}'
    nowhere = 'smelt_http_requests_total{method="GET",route="none",status="404"}'
    assert value(answer.text, runs) - value(before, runs) == 2
    assert value(answer.text, nowhere) - value(before, nowhere) == 2
    count = 'smelt_http_request_seconds_count{route="/v1/runs/{run_id}"}'
    assert value(answer.text, count) - value(before, count) == 2
    assert value(answer.text, "smelt_http_requests_in_flight") == 1
    assert "nowhere" not in answer.text


def test_a_made_up_method_makes_no_series() -> None:
    telemetry.count_request("BREW", "none", 404, 0.1)
    assert "BREW" not in telemetry.exposition([]).decode()


@pytest.mark.anyio
async def test_lines_are_written_by_themselves_in_a_moment(
    log_file: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(3):
        telemetry.request_log.write(telemetry.RequestLine("GET", f"/{number}", 200, 1.5, None, "r1"))
    assert io.StringIO.getvalue(log_file) == ""
    written = anyio.Event()
    monkeypatch.setattr(log_file, "flush", written.set)
    with anyio.fail_after(5):
        await written.wait()
    assert [line["path"] for line in lines_of(log_file)] == ["/0", "/1", "/2"]


@given(st.lists(st.floats(0, 400), max_size=30))
def test_durations_are_counted_as_prometheus_counts_them(seconds: list[float]) -> None:
    ours, theirs = Durations("took_seconds", "Took.", "what"), CollectorRegistry()
    histogram = Histogram("took_seconds", "Took.", ["what"], buckets=telemetry.SECONDS, registry=theirs)
    for value in seconds:
        ours.observe("it", value)
        histogram.labels("it").observe(value)
    registry = CollectorRegistry()
    registry.register(ours)
    expected = [line for line in generate_latest(theirs).decode().splitlines() if "_created" not in line]
    assert generate_latest(registry).decode().splitlines() == expected


def test_answers_and_workers_are_counted() -> None:
    load = ModelLoad("gpt", 1000, 10, 4, 7, total_prompt_tokens=30, total_cached_tokens=20, total_preempted=2)
    worker = WorkerInfo("box:1", 1, "cpu", ("gpt",), 3, 2, (load,))
    before = telemetry.exposition([]).decode()
    telemetry.count_answer("gpt", "stop", 10, 5, 4)
    telemetry.observe_first_token("gpt", 0.2)
    telemetry.observe_gap("gpt", 0.01)
    after = telemetry.exposition([worker]).decode()
    for series, grows in (
        ('smelt_tokens_total{kind="prompt",model="gpt"}', 10),
        ('smelt_tokens_total{kind="output",model="gpt"}', 5),
        ('smelt_tokens_total{kind="cached_prompt",model="gpt"}', 4),
        ('smelt_answers_total{model="gpt",reason="stop"}', 1),
        ('smelt_first_token_seconds_count{model="gpt"}', 1),
        ('smelt_inter_token_seconds_count{model="gpt"}', 1),
    ):
        assert value(after, series) - value(before, series) == grows
    assert value(after, 'smelt_worker_sequences{state="running",worker="box:1"}') == 3
    assert value(after, "smelt_workers ") == 1
    for name, figure in (
        ("model_bytes", 1000), ("batch_tokens", 7), ("prompt_tokens_total", 30), ("cached_tokens_total", 20),
        ("preemptions_total", 2),
    ):  # fmt: skip
        assert value(after, f'smelt_engine_{name}{{model="gpt",worker="box:1"}}') == figure
    for state, figure in (("used", 4), ("free", 6)):
        series = f'smelt_engine_blocks{{model="gpt",state="{state}",worker="box:1"}}'
        assert value(after, series) == figure
    assert "box:1" not in telemetry.exposition([]).decode()


@pytest.mark.anyio
async def test_a_request_is_a_line_without_secrets(services: Services, log_file: io.StringIO) -> None:
    key = make_key(services)
    async with client_of(create_app(services), key) as client:
        await client.get(f"/v1/runs?api_key={key}&prompt=private", headers={"x-request-id": "r1"})
        await client.get(f"/v1/models/{key}")
        await client.post("/login", data={"key": key})
        await client.get("/healthz")
    lines = [line for line in lines_of(log_file) if line["event"] == "request"]
    assert [line["path"] for line in lines] == ["/v1/runs", "/v1/models/tml-..."]
    assert {"method": "GET", "status": 200, "request_id": "r1", "level": "info"}.items() <= lines[0].items()
    assert isinstance(lines[0]["ms"], float)
    assert lines[0]["key"]
    # The test's own client logs its addresses; the server's lines are what counts.
    ours = [line for line in log_file.getvalue().splitlines() if '"logger":"httpx"' not in line]
    assert not [line for line in ours if key in line or "private" in line]


def test_other_modules_log_in_the_same_way(log_file: io.StringIO) -> None:
    logging.getLogger("smelt.transport").warning("hung up on %s", "a\n{stranger} with Bearer abc.def and sk-1234")
    try:
        raise ValueError("hf_secret")
    except ValueError:
        structlog.get_logger().exception("failed", path="/x")
    first, second = lines_of(log_file)
    assert first["event"] == "hung up on a\n{stranger} with Bearer ... and sk-..."
    assert (first["logger"], first["level"]) == ("smelt.transport", "warning")
    assert "ValueError: hf_..." in str(second["exception"])


@pytest.mark.anyio
async def test_people_get_plain_lines() -> None:
    file = io.StringIO()
    telemetry.configure_logging(file, for_people=True)
    telemetry.request_log.write(telemetry.RequestLine("GET", "/v1/models/tml-abc", 200, 1.5, None, "r1"))
    telemetry.request_log.flush()
    assert "/v1/models/tml-..." in file.getvalue()
    assert not file.getvalue().startswith("{")
