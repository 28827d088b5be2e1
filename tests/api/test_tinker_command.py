"""Tinker's own command line against a server on a socket."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tinker
from click.testing import CliRunner
from tinker.cli.__main__ import main_cli as cli

from scripted_training import FILES, training_server

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

Command = Callable[..., str]


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Command, tinker.TrainingClient]]:
    """(a command that gives its output, a model in training)."""
    monkeypatch.setenv("TINKER_TELEMETRY", "0")
    monkeypatch.setenv("TINKER_API_KEY", "tml-test")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> str:
        done = CliRunner().invoke(cli, list(arguments))
        assert done.exit_code == 0, (arguments, done.output, done.exception)
        return done.output

    with training_server(tmp_path / "home") as (url, _, _):
        monkeypatch.setenv("TINKER_BASE_URL", url)
        with tinker.ServiceClient() as client:
            yield run, client.create_lora_training_client("tiny", rank=8).result()


def test_every_command(started: tuple[Command, tinker.TrainingClient], tmp_path: Path) -> None:
    run, training = started
    path = training.save_state("ck").result().path
    model_id = training.get_info().model_id
    assert "tiny" in run("model", "list")
    assert "Credentials available: yes" in run("auth", "status")
    assert model_id in run("--format", "json", "run", "list")
    assert json.loads(run("--format", "json", "run", "info", model_id))["lora_rank"] == 8
    assert path in run("--format", "json", "checkpoint", "list")
    assert path in run("--format", "json", "checkpoint", "list", "--run-id", model_id)
    run("checkpoint", "publish", path)
    run("checkpoint", "set-ttl", path, "--ttl", "7200")
    shown = json.loads(run("--format", "json", "checkpoint", "info", path))
    assert shown["public"] is True
    run("checkpoint", "unpublish", path)
    run("checkpoint", "download", path, "--output", str(tmp_path / "out"))
    assert sorted(file.name for file in (tmp_path / "out").rglob("*.*") if file.is_file()) == sorted(FILES)
    run("session", "export-trace", model_id.partition(":")[0])
    [trace] = tmp_path.glob("*.pftrace")
    assert json.loads(trace.read_text())["traceEvents"]
    run("billing", "checkpoint-storage")
    run("billing", "usage", "2026-01-01", "2026-02-01")
    run("checkpoint", "delete", path, "--yes")
    assert path not in run("--format", "json", "checkpoint", "list", "--run-id", model_id)
