"""The rules that conftest lays down hold: skips are seen in CI, and the network is out of reach."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

CASES = """
import pytest

def test_passes():
    pass

def test_skips_for_want_of_a_gpu():
    pytest.skip("no GPU here")

def test_skips_for_no_good_reason():
    pytest.skip("did not feel like it")

@pytest.mark.xfail(strict=True)
def test_is_known_to_fail():
    assert False
"""


def run_cases(folder: Path, ci: bool) -> str:
    """The last line of a pytest run over CASES with our conftest."""
    (folder / "conftest.py").write_text((Path(__file__).parent / "conftest.py").read_text())
    (folder / "test_cases.py").write_text(CASES)
    environment = {**os.environ, "CI": "true" if ci else ""}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(folder), str(folder)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=folder)
    return run.stdout.strip().splitlines()[-1]


def test_a_skip_without_an_expected_reason_fails_in_ci(tmp_path: Path) -> None:
    assert run_cases(tmp_path, ci=True).startswith("1 failed, 1 passed, 1 skipped, 1 xfailed")


def test_skips_are_skips_on_a_laptop(tmp_path: Path) -> None:
    assert run_cases(tmp_path, ci=False).startswith("1 passed, 2 skipped, 1 xfailed")


def test_the_network_is_out_of_reach() -> None:
    with socket.socket() as outward, pytest.raises(OSError, match="tests may not reach"):
        outward.connect(("192.0.2.1", 80))
    with pytest.raises(socket.gaierror, match="tests may not look up"):
        socket.create_connection(("example.org", 80), timeout=1)


def test_this_machine_can_be_reached() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname(), timeout=5).close()
