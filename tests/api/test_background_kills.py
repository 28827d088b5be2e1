"""Fifty answers in the background while the worker and the API are killed: all are written, each once."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pytest
from sqlalchemy import func, select

from processes import eventually, needs_proc
from serving import Server, serving, write_tiny_model
from smelt.storage.database import open_database, sqlite_url
from smelt.storage.tables import futures

pytestmark = [needs_proc, pytest.mark.slow, pytest.mark.timeout(400)]

NUM_REQUESTS = 50
KILLS = {10: "worker", 25: "api", 40: "worker"}  # after so many were accepted

T = TypeVar("T")


def body(number: int) -> dict[str, Any]:
    return {"model": "tiny", "prompt": f"Once {number}", "max_tokens": 30, "seed": number, "n": 2, "logprobs": 0}


def persistently(ask: Callable[[], T]) -> T:
    """The answer, where connections may break meanwhile."""

    def look() -> T | None:
        try:
            return ask()
        except (httpx.TransportError, httpx.HTTPStatusError):
            return None

    found = eventually(look, "an answer", 120)
    assert found is not None
    return found


def promised(server: Server, number: int) -> str:
    key = {"Idempotency-Key": f"k{number}"}
    asked = {**body(number), "background": True}
    answer = httpx.post(f"{server.url}/v1/completions", json=asked, headers=key, timeout=30)
    return str(answer.raise_for_status().json()["id"])


def finished(server: Server, answer_id: str) -> dict[str, Any] | None:
    answer = httpx.get(f"{server.url}/v1/completions/{answer_id}", params={"wait": 30}, timeout=60)
    told: dict[str, Any] = answer.raise_for_status().json()
    return None if told["status"] in ("queued", "in_progress") else told


def test_fifty_answers_survive_the_deaths_of_worker_and_api(tmp_path: Path) -> None:
    home = tmp_path / "home"
    with serving(home, str(write_tiny_model(tmp_path / "tiny"))) as server:
        ids = []
        for number in range(NUM_REQUESTS):
            ids.append(persistently(lambda number=number: promised(server, number)))
            if (role := KILLS.get(len(ids))) is not None:
                os.kill(server.pid_of(role), signal.SIGKILL)
        answers = [persistently(lambda answer_id=answer_id: finished(server, answer_id)) for answer_id in ids]
        live = [httpx.post(f"{server.url}/v1/completions", json=body(n), timeout=60) for n in range(NUM_REQUESTS)]
    assert [answer["status"] for answer in answers] == ["completed"] * NUM_REQUESTS
    assert len(set(ids)) == NUM_REQUESTS
    for answer, alone in zip(answers, live, strict=True):
        assert [choice["text"] for choice in answer["choices"]] == [c["text"] for c in alone.json()["choices"]]
    engine = open_database(sqlite_url(home / "smelt.db"))
    with engine.connect() as connection:
        states = connection.execute(select(futures.c.state, func.count()).group_by(futures.c.state)).all()
    engine.dispose()
    assert [tuple(row) for row in states] == [("done", NUM_REQUESTS)]
