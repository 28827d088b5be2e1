"""A thousand requests of a batch while the worker and the API are killed: each is answered, and once."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import func, select

from processes import eventually, needs_proc
from serving import Server, serving, write_tiny_model
from smelt.storage.database import open_database, sqlite_url
from smelt.storage.tables import futures

pytestmark = [needs_proc, pytest.mark.slow, pytest.mark.timeout(500)]

NUM_REQUESTS = 1000
KILLS = [(100, "worker"), (300, "api"), (550, "worker"), (800, "api")]  # after so many have an answer


def request(number: int) -> dict[str, Any]:
    body = {"model": "tiny", "prompt": f"Once {number}", "max_tokens": 8, "seed": number}
    return {"custom_id": f"line-{number}", "method": "POST", "url": "/v1/completions", "body": body}


def persistently(server: Server, method: str, path: str, **options: Any) -> httpx.Response:
    """The answer, where connections may break meanwhile."""

    def look() -> httpx.Response | None:
        try:
            return httpx.request(method, f"{server.url}{path}", timeout=30, **options).raise_for_status()
        except (httpx.TransportError, httpx.HTTPStatusError):
            return None

    found = eventually(look, "an answer", 120)
    assert found is not None
    return found


def num_answered(server: Server, batch_id: str) -> int:
    counts = persistently(server, "GET", f"/v1/batches/{batch_id}").json()["request_counts"]
    return int(counts["completed"] + counts["failed"])


def test_a_thousand_requests_survive_the_deaths_of_worker_and_api(tmp_path: Path) -> None:
    home = tmp_path / "home"
    content = "".join(json.dumps(request(number)) + "\n" for number in range(NUM_REQUESTS)).encode()
    with serving(home, str(write_tiny_model(tmp_path / "tiny"))) as server:
        form = {"data": {"purpose": "batch"}, "files": {"file": ("in.jsonl", content)}}
        file_id = persistently(server, "POST", "/v1/files", **form).json()["id"]
        asked = {"input_file_id": file_id, "endpoint": "/v1/completions", "completion_window": "24h"}
        batch_id = httpx.post(f"{server.url}/v1/batches", json=asked).raise_for_status().json()["id"]
        for num, role in KILLS:
            eventually(lambda num=num: num_answered(server, batch_id) >= num, f"{num} answers", 120)
            os.kill(server.pid_of(role), signal.SIGKILL)
        eventually(
            lambda: persistently(server, "GET", f"/v1/batches/{batch_id}").json()["completed_at"], "the end", 200
        )
        batch = persistently(server, "GET", f"/v1/batches/{batch_id}").json()
        text = persistently(server, "GET", f"/v1/files/{batch['output_file_id']}/content").text
        some = range(0, NUM_REQUESTS, 100)
        alone = {n: persistently(server, "POST", "/v1/completions", json=request(n)["body"]).json() for n in some}
    assert batch["request_counts"] == {"total": NUM_REQUESTS, "completed": NUM_REQUESTS, "failed": 0}
    assert (batch["status"], batch["error_file_id"]) == ("completed", None)
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["custom_id"] for line in lines] == [f"line-{number}" for number in range(NUM_REQUESTS)]
    for number, answer in alone.items():
        assert lines[number]["response"]["body"]["choices"] == answer["choices"]
    engine = open_database(sqlite_url(home / "smelt.db"))
    with engine.connect() as connection:
        assert connection.execute(select(func.count()).select_from(futures)).scalar_one() == 0
    engine.dispose()
