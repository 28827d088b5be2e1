"""`smelt serve` as its user meets it: mistakes in one line, addresses, answers, and any of its processes killed."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from certificates import write_certificate
from processes import all_below, eventually, is_alive, needs_proc
from serving import ROLES, Server, environment, serving, write_tiny_model
from smelt.cli import app
from smelt.cluster.claims import held_home, listening_socket
from smelt.control.keys import create_key
from smelt.storage.database import open_database, sqlite_url

pytestmark = [needs_proc, pytest.mark.timeout(200)]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "tiny")


Refused = Callable[..., str]


@pytest.fixture
def refused(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refused:
    """The one line with which `smelt serve` refuses such arguments."""
    monkeypatch.setenv("SMELT_CONFIG", "")  # so that it is put back

    def refuse(*arguments: str) -> str:
        with pytest.raises(SystemExit) as stop:
            app.main(["serve", *arguments])
        said, complaint = capsys.readouterr()
        assert (stop.value.code, said, complaint.count("\n")) == (2, "", 1)
        return complaint.removeprefix("error: ").rstrip()

    return refuse


def test_a_home_folder_that_is_held_names_the_holder(home: Path, refused: Refused) -> None:
    with held_home(home):
        assert refused().startswith(f"process {os.getpid()} serves {home} already; stop it")


def test_a_port_that_is_taken_is_refused(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    with listening_socket("127.0.0.1", 0) as listener:
        port = str(listener.getsockname()[1])
        assert refused("--port", port).startswith(f"port {port} of 127.0.0.1 is taken")
        monkeypatch.setenv("PORT", port)
        assert refused().startswith(f"port {port} of 127.0.0.1 is taken")


def test_a_model_that_cannot_be_served_is_refused(refused: Refused, model: Path) -> None:
    assert refused("nobody").startswith("no model or folder 'nobody'")
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert refused(str(model)).startswith(f"{model} cannot be served: ")


def test_a_model_without_a_tokenizer_is_refused(refused: Refused, model: Path) -> None:
    kept = {"config.json", "model.safetensors"}
    for file in model.iterdir():
        if file.name not in kept:
            file.unlink()
    assert refused(str(model)).startswith(f"{model} has no tokenizer")


def test_other_machines_need_a_key_here(refused: Refused) -> None:
    assert "there is no API key: make one" in refused("--host", "0.0.0.0")


def test_workers_of_other_machines_need_tls_here(refused: Refused) -> None:
    assert refused("--worker-address", "0.0.0.0:0").startswith("--worker-address needs TLS")


def test_a_config_file_takes_the_place_of_the_usual_one(refused: Refused, tmp_path: Path) -> None:
    assert refused("--config", str(tmp_path / "none.yaml")).startswith("config file")
    (tmp_path / "other.yaml").write_text("worker_address: 0.0.0.0:0\n")
    assert refused("--config", str(tmp_path / "other.yaml")).startswith("--worker-address needs TLS")


def test_with_a_key_other_machines_may_come(home: Path) -> None:
    home.mkdir()
    engine = open_database(sqlite_url(home / "smelt.db"))
    with engine.begin() as connection:
        key = create_key(connection, "phone")
    engine.dispose()
    with serving(home, "--host", "0.0.0.0", "--no-worker") as server:
        assert httpx.get(f"{server.url}/v1/models").status_code == 401
        assert httpx.get(f"{server.url}/v1/models", headers={"authorization": f"Bearer {key}"}).json()["data"] == []
        assert server.end() == 0


def client_of(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60)


def ask_once(server: Server) -> None:
    with client_of(server) as client:
        assert client.completions.create(model="tiny", prompt="Once", max_tokens=5).choices[0].text


@pytest.mark.slow
def test_it_serves_and_ends_in_order(home: Path, model: Path) -> None:
    with serving(home, str(model)) as server, client_of(server) as client:
        assert client.models.list().data[0].id == "tiny"
        whole = client.completions.create(model="tiny", prompt="Once", max_tokens=20, seed=3)
        pieces = client.completions.create(model="tiny", prompt="Once", max_tokens=20, seed=3, stream=True)
        assert "".join(piece.choices[0].text for piece in pieces) == whole.choices[0].text
        began = time.monotonic()
        second = Server(home)
        assert second.process.wait(30) == 2
        assert second.log.read_text().endswith("choose another SMELT_HOME\n")
        assert time.monotonic() - began < 10, "5 s where nothing else runs"
        second.process.communicate()
        below = all_below(server.process.pid)
        assert len(below) >= 3
        pieces = client.completions.create(model="tiny", prompt="Once", max_tokens=20, stream=True)
        first = next(iter(pieces))
        server.process.terminate()
        rest = [piece.choices[0].finish_reason for piece in pieces]
        assert first.choices[0].finish_reason is None
        assert rest[-1] is not None
        server.process.communicate(timeout=50)
        assert server.process.returncode == 0
    assert not [pid for pid in below if is_alive(pid)]


@pytest.mark.slow
@pytest.mark.parametrize("role", ROLES)
def test_a_killed_process_comes_back(home: Path, model: Path, role: str) -> None:
    with serving(home, str(model)) as server, client_of(server) as client:
        client.completions.create(model="tiny", prompt="Once", max_tokens=5)
        killed = server.pid_of(role)
        below = all_below(killed)
        os.kill(killed, signal.SIGKILL)
        eventually(lambda: server.pid_of(role) != killed, "the next one")
        assert not [pid for pid in below if is_alive(pid)]
        assert client.completions.create(model="tiny", prompt="Once", max_tokens=5).usage is not None
        assert server.end() == 0


@pytest.mark.slow
def test_a_killed_supervisor_leaves_nobody_and_another_starts_at_once(home: Path, model: Path) -> None:
    with serving(home, str(model)) as server:
        ask_once(server)
        port = server.url.rpartition(":")[2]
        below = all_below(server.process.pid)
        server.process.kill()
        with serving(home, str(model), "--port", port) as another:
            eventually(lambda: not [pid for pid in below if is_alive(pid)], "the end of the old processes", 5)
            ask_once(another)


@pytest.mark.slow
def test_what_was_accepted_is_answered_whoever_dies(home: Path, model: Path) -> None:
    with serving(home, str(model)) as server:
        eventually(lambda: httpx.get(f"{server.url}/health", timeout=30).json()["model_loaded"], "the model", 60)
        accepted = [promised(server, number) for number in range(3)]
        for role in ROLES:
            os.kill(server.pid_of(role), signal.SIGKILL)
            accepted.append(persistently(lambda: promised(server, len(accepted))))
        answers = [persistently(lambda name=name: fetched(server, name)) for name in accepted]
    assert [answer["status"] for answer in answers] == ["completed"] * len(accepted)


def test_an_import_that_was_accepted_is_done_though_the_api_dies(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tiny_model(home / "runs" / "done" / "best")
    monkeypatch.setenv("SMELT_FAULT", "after_commit_before_answer:1")  # which kills it there
    with serving(home, "--no-worker") as server:
        with pytest.raises(httpx.TransportError):
            httpx.post(f"{server.url}/v1/imports", json={"source": "runs/done", "name": "mine"}, timeout=30)
        (job,) = persistently(lambda: httpx.get(f"{server.url}/v1/imports", timeout=30).json()["data"])
        job = httpx.get(f"{server.url}/v1/imports/{job['id']}", params={"wait": 20}, timeout=60).json()
        assert (job["name"], job["status"]) == ("mine", "completed")
        assert httpx.get(f"{server.url}/v1/models/mine", timeout=30).json()["context"] == 64


def promised(server: Server, number: int) -> str:
    """The id of an answer that was asked for in the background."""
    body = {"model": "tiny", "prompt": f"Once {number}", "max_tokens": 40, "background": True}
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=30).raise_for_status().json()
    return str(answer["id"])


def fetched(server: Server, name: str) -> dict[str, Any]:
    answer = httpx.get(f"{server.url}/v1/completions/{name}", params={"wait": 20}, timeout=60).raise_for_status()
    return dict(answer.json())


def persistently(ask: Callable[[], Any]) -> Any:
    """The answer, where connections may break meanwhile."""

    def look() -> Any:
        try:
            return ask()
        except (httpx.TransportError, httpx.HTTPStatusError):
            return None

    return eventually(look, "an answer", 60)


@pytest.mark.slow
def test_a_worker_of_another_home_folder_joins_over_tls(home: Path, model: Path, tmp_path: Path) -> None:
    certificate, key = write_certificate(tmp_path / "tls", "127.0.0.1")
    with listening_socket("127.0.0.1", 0) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    door = ["--worker-address", address, "--tls-certificate", str(certificate), "--tls-key", str(key)]
    shutil.copytree(model, tmp_path / "elsewhere/models/tiny")
    with serving(home, str(model), "--no-worker", *door) as server:
        trust = ["--tls-certificate", str(certificate), "--key-file", str(home / "worker.key")]
        command = [sys.executable, "-m", "smelt", "worker", "--connect", address, *trust]
        with subprocess.Popen(command, env=environment(tmp_path / "elsewhere"), stderr=subprocess.DEVNULL) as worker:
            try:
                eventually(lambda: httpx.get(f"{server.url}/v1/workers").json()["data"], "the worker", 60)
                ask_once(server)
            finally:
                worker.terminate()
        assert worker.returncode == 0
        assert server.end() == 0


@pytest.mark.slow
def test_a_stream_whose_worker_is_killed_ends_with_an_error(home: Path, model: Path) -> None:
    with serving(home, str(model)) as server, client_of(server) as client:
        pieces = client.completions.create(model="tiny", prompt="Once", max_tokens=60_000, stream=True)
        next(iter(pieces))
        threading.Timer(0.3, os.kill, (server.pid_of("worker"), signal.SIGKILL)).start()
        with pytest.raises(openai.APIError, match="worker"):
            for _ in pieces:
                pass
