"""The demo's end: it serves what it trained, lets OpenAI's client ask, and stays until Ctrl-C."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from processes import all_below, eventually, is_alive, needs_proc
from serving import environment, write_tiny_model
from smelt.cli import demo
from smelt.cli.demo_server import demo_server, free_port, last_line
from smelt.cluster.claims import held_home, listening_socket
from smelt.errors import ConfigError, SmeltError
from smelt.settings import load_settings

pytestmark = pytest.mark.timeout(300)


def test_a_home_folder_that_serves_is_left_alone(home: Path) -> None:
    with held_home(home):
        result = CliRunner().invoke(demo.command, ["--seconds", "1"])
    assert isinstance(result.exception, ConfigError)
    assert f"process {os.getpid()} serves {home} already" in str(result.exception)


def test_a_port_that_is_taken_is_replaced_and_that_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    with listening_socket("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        assert free_port(port) == 0
    assert capsys.readouterr().err == f"port {port} is taken; taking another one\n"
    assert free_port(port) == port
    assert capsys.readouterr().err == ""


def test_a_server_that_cannot_start_says_why(home: Path, tmp_path: Path) -> None:
    home.mkdir()
    with (
        pytest.raises(SmeltError, match="did not start: .*no model or folder"),
        demo_server(tmp_path / "none", load_settings()),
    ):
        pass


def test_somebody_may_have_said_nothing(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("")
    assert last_line(tmp_path / "log") == "it said nothing"


@pytest.mark.slow
def test_the_server_answers_and_ends_with_the_block(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    home.mkdir()
    monkeypatch.setenv("SMELT_THREADS", "1")
    monkeypatch.setenv("SMELT_PORT", "0")
    with demo_server(write_tiny_model(tmp_path / "demo"), load_settings()) as server:
        server.write("demo", "Once", seed=1)
        below = all_below(server.process.pid)
        assert below
    assert len(capsys.readouterr().out) > 20
    assert server.process.returncode == 0
    assert not [pid for pid in below if is_alive(pid)]


@needs_proc
@pytest.mark.slow
def test_the_demo_stays_until_ctrl_c(home: Path) -> None:
    with listening_socket("127.0.0.1", 0) as taken:
        variables = {**environment(home), "SMELT_PORT": str(taken.getsockname()[1])}
        command = [sys.executable, "-m", "smelt", "demo", "--seconds", "1"]
        with subprocess.Popen(
            command, env=variables, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            said = ""
            while not said.endswith("(model demo)\n"):
                line = process.stdout.readline()
                assert line, "it ended"
                said += line
            below = all_below(process.pid)
            process.send_signal(signal.SIGINT)
            rest, complaints = process.communicate(timeout=60)
    assert process.returncode == 0, complaints
    assert all(f"\n{prompt}" in f"\n{said}" for prompt in demo.PROMPTS)
    assert "is taken; taking another one" in complaints
    assert complaints.endswith("Ctrl-C stops the server\n\nstopping\n")
    eventually(lambda: not [pid for pid in below if is_alive(pid)], "the end of all processes", 5)
