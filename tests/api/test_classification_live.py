"""A live server trains a classifier from an upload, serves it, and answers many clients at once; a process dies."""

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from processes import eventually, needs_proc
from serving import serving

pytestmark = [needs_proc, pytest.mark.slow, pytest.mark.timeout(1200)]

WORDS = {"animal": ("cat", "dog", "horse", "sheep"), "fruit": ("apple", "pear", "plum", "grape")}


def table(starts: tuple[str, ...]) -> bytes:
    rows = [f"{label},{start} the {word}" for label, words in WORDS.items() for word in words for start in starts]
    return "\n".join(["label,text", *rows]).encode()


def upload(client: httpx.Client, content: bytes) -> str:
    answer = client.post("/v1/files", files={"file": ("texts.csv", content)}, data={"purpose": "user_data"})
    assert answer.status_code == 200, answer.text
    file_id: str = answer.json()["id"]
    return file_id


def test_from_an_upload_to_answers(tmp_path: Path) -> None:
    with serving(tmp_path / "home") as server, httpx.Client(base_url=server.url, timeout=120) as client:
        assert client.post("/predict", json={"text": "a dog"}).status_code == 503
        config: dict[str, Any] = {
            "recipe": "classify",
            "data": upload(client, table(("I saw", "this is", "where was", "we like", "they had"))),
            "valid": upload(client, table(("look at", "give me"))),
            "tokenizer": "bpe:300",
            "num_buckets": 100,
            "batch_size": 8,
            "epochs": 20,
            "learning_rate": 2e-2,
        }
        answer = client.post("/v1/runs", json=config)
        assert answer.status_code == 201, answer.text
        run = answer.json()["id"]

        def ended() -> dict[str, Any] | None:
            shown: dict[str, Any] = client.get(f"/v1/runs/{run}").json()
            return shown if shown["state"] in ("succeeded", "failed") else None

        shown = eventually(ended, "the end of the run", 600)
        assert shown is not None
        assert shown["state"] == "succeeded", shown
        assert "smelt train-classifier" in shown["command_line"]
        curves = client.get(f"/v1/runs/{run}/metrics").json()
        assert curves["validation"]["figures"]["accuracy"][-1] > 0.7
        job = client.post("/v1/imports", json={"source": f"runs/{run}/best", "name": "things"}).json()
        job = client.get(f"/v1/imports/{job['id']}?wait=60").json()
        assert job["status"] == "completed", job

        def label_of(text: str) -> str:
            answer = client.post("/predict", json={"text": text})
            assert answer.status_code == 200, answer.text
            label: str = answer.json()["label"]
            return label

        texts = {f"I saw the {word}": label for label, words in WORDS.items() for word in words}
        with ThreadPoolExecutor(16) as pool:
            assert list(pool.map(label_of, texts)) == list(texts.values())
        assert client.get("/health").json()["model_loaded"] is True
        os.kill(server.pid_of("worker"), signal.SIGKILL)
        assert eventually(
            lambda: client.post("/predict", json={"text": "I saw the plum"}).status_code == 200, "a worker", 300
        )
