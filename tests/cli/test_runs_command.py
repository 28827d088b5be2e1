"""`smelt runs`: what it lists and shows of a home folder, alone and beside a server, and what it asks of that."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from live import serving
from scripted import scripted
from smelt.api.app import create_app
from smelt.cli.runs import command
from smelt.cluster.claims import held_home, note_address
from smelt.configs import RUN_LOG, RUN_METRICS
from smelt.control.run_folders import register
from smelt.errors import InvalidInput, NotFound, SmeltError, Unavailable
from smelt.run_configs import TrainConfig
from smelt.settings import load_settings


def runs(*arguments: str) -> str:
    """What the command prints; its errors are raised."""
    result = CliRunner().invoke(command, arguments, standalone_mode=False, env={"COLUMNS": "200"})
    if result.exception is not None:
        raise result.exception
    return result.output


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SMELT_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def run(home: Path, tmp_path: Path) -> str:
    """The id of a run that was stopped at step 3 of 10."""
    out_dir = tmp_path / "out"
    (out_dir / "checkpoints" / "step-00000003").mkdir(parents=True)
    (out_dir / "last").symlink_to("checkpoints/step-00000003")
    lines = [{"kind": "step", "step": 3, "loss": 1.25}, {"kind": "summary", "stop_reason": "interrupted"}]
    (out_dir / RUN_METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    (out_dir / RUN_LOG).write_text("".join(f"line {number}\n" for number in range(300)))
    config = TrainConfig(out_dir=str(out_dir), max_iters=10, data_path="builtin:pydoc", learning_rate=2e-3)
    return register(config, load_settings().runs).id


@pytest.fixture
def server(home: Path) -> Iterator[None]:
    with scripted(home) as (services, _), held_home(home), serving(create_app(services)) as url:
        note_address(home, url)
        yield


def test_runs_are_told_of_without_a_server(run: str) -> None:
    heading, row = runs("ls").splitlines()
    assert heading.split() == ["id", "name", "state", "step", "loss", "best", "val", "tokens/s", "started"]
    assert row.split()[:7] == [run, "out", "cancelled", "3", "of", "10", "1.2500"]
    shown = runs("show", "out")
    assert "it was stopped before its end; it can be resumed" in shown
    assert "step-00000003 (0.0 MB, last)" in shown
    assert "\nlearning_rate: 0.002\n" in shown
    assert "smelt train --data-path builtin:pydoc" in shown
    assert runs("logs", run[:8]).splitlines() == [f"line {number}" for number in range(100, 300)]
    assert runs("logs", run.removeprefix("run-"), "-n", "2", "--follow").splitlines() == ["line 298", "line 299"]
    with pytest.raises(NotFound, match="smelt runs ls"):
        runs("show", "nothing")
    with pytest.raises(Unavailable, match="--init-from resume"):
        runs("resume", run)


def test_there_may_be_none(home: Path) -> None:
    assert "no runs yet" in runs("ls")


@pytest.mark.usefixtures("server")
def test_a_server_resumes_and_cancels_and_is_asked_how_runs_stand(run: str) -> None:
    assert "is queued" in runs("resume", run)
    assert "waits to go on from its last checkpoint" in runs("show", run)
    (row,) = [line for line in runs("ls").splitlines() if line.startswith(run)]  # beside what the server logs
    assert row.split()[2] == "queued"
    with pytest.raises(SmeltError, match="queued already"):
        runs("resume", run)
    assert "is cancelled" in runs("cancel", run)
    assert "is queued" in runs("resume", run)


@pytest.mark.usefixtures("server")
def test_a_run_of_a_terminal_is_not_the_servers_to_stop(run: str) -> None:
    with pytest.raises(SmeltError, match="Ctrl-C") as refusal:
        runs("cancel", run)
    assert not isinstance(refusal.value, InvalidInput)
