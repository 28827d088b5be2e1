"""The set-up that `make` runs: each thing that can be wrong is one clear line, and an interruption is repaired.

A pretended Python stands in for the real one, so that nothing is installed; one slow test uses a real pip.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("python3.11", "python3.12", "python3.13", "python3")
PRETENDED_PYTHON = """#!/bin/sh
echo "$*" >>"$CALLS"
case "$*" in
    "-c import sys;"*) exit "${IS_OLD:-0}" ;;
    "-c import ensurepip"*) exit "${HAS_NO_VENV:-0}" ;;
    "-m venv --clear .venv") rm -rf .venv; mkdir -p .venv/bin; cp "$0" .venv/bin/python ;;
    "-m pip --version") exit "${HAS_NO_PIP:-0}" ;;
    "-m pip install"*) echo "$PIP_SAYS"; exit "${PIP_CODE:-0}" ;;
esac
"""


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the real scripts, where every Python on the PATH is a pretended one."""
    folder = tmp_path / "checkout"
    (folder / "scripts").mkdir(parents=True)
    for name in ("scripts/setup", "Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder / name)
    for name in NAMES:
        write_program(tmp_path / "bin" / name, PRETENDED_PYTHON)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.delenv("PYTHON", raising=False)
    return folder


def write_program(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def run(folder: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


def failure(folder: Path, **environment: str) -> str:
    """What a failing set-up says on stderr, which must be one line."""
    result = run(folder, "scripts/setup", "run", **environment)
    assert result.returncode == 1
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert not (folder / ".venv/.installed-run").exists()
    return result.stderr


def calls(checkout: Path) -> list[str]:
    """What the pretended Python was asked to do since the last look."""
    log = checkout.parent / "calls"
    lines = log.read_text().splitlines()
    log.unlink()
    return lines


def pip_calls(checkout: Path) -> list[str]:
    return [line for line in calls(checkout) if line.startswith("-m pip install")]


def test_an_old_python_is_refused(checkout: Path) -> None:
    assert "no Python 3.11 or newer among: python3.11 python3.12 python3.13 python3" in failure(checkout, IS_OLD="1")


def test_a_python_that_is_named_and_absent_is_refused(checkout: Path) -> None:
    assert "no Python 3.11 or newer among: /no/python" in failure(checkout, PYTHON="/no/python")


def test_a_python_without_venv_says_what_to_install(checkout: Path) -> None:
    assert "python3.11 has no venv module; install it" in failure(checkout, HAS_NO_VENV="1")


def test_a_full_disk_is_seen_before_anything_is_written(checkout: Path) -> None:
    df = "#!/bin/sh\necho Filesystem\necho disk 9999999 9999999 20480 99% /\n"
    write_program(checkout.parent / "bin/df", df)
    assert "no disk space: 20 MiB are free here" in failure(checkout)
    assert not (checkout / ".venv").exists()


def test_a_disk_that_fills_up_leaves_the_environment_marked_as_unfinished(checkout: Path) -> None:
    words = "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device"
    assert "no disk space left while installing" in failure(checkout, PIP_CODE="1", PIP_SAYS=words)
    assert (checkout / ".venv/.unfinished").exists()


def test_no_index_is_not_mistaken_for_a_broken_environment(checkout: Path) -> None:
    words = "WARNING: Retrying (Retry(total=1)) after connection broken by 'NewConnectionError('"
    assert "no package index reachable" in failure(checkout, PIP_CODE="1", PIP_SAYS=words)
    assert not (checkout / ".venv/.unfinished").exists()


def test_any_other_failure_of_pip_is_passed_on_with_the_log(checkout: Path) -> None:
    said = failure(checkout, PIP_CODE="1", PIP_SAYS="ERROR: No matching distribution found for torch==2.13.0")
    assert said == "error: ERROR: No matching distribution found for torch==2.13.0 (all of it: .venv/setup.log)\n"


def test_the_stamp_is_written_last(checkout: Path) -> None:
    result = run(checkout, "scripts/setup", "run")
    assert result.returncode == 0
    assert [line.partition(" ... ")[0] for line in result.stdout.splitlines()] == [
        "making .venv with python3.11",
        "installing torch",
        "installing smelt (run)",
        "compiling bytecode",
    ]
    assert (checkout / ".venv/.installed-run").exists()
    assert not (checkout / ".venv/.unfinished").exists()
    assert all("-c constraints.txt" in line for line in pip_calls(checkout))


def test_a_second_set_up_keeps_the_environment(checkout: Path) -> None:
    run(checkout, "scripts/setup", "run")
    calls(checkout)
    run(checkout, "scripts/setup", "dev")
    again = calls(checkout)
    assert not any("venv --clear" in line for line in again)
    assert again[-2].endswith("-e .[dev]")


@pytest.mark.parametrize("damage", ["killed", "without pip", "without python"])
def test_a_half_made_environment_is_made_anew(checkout: Path, damage: str) -> None:
    run(checkout, "scripts/setup", "run")
    calls(checkout)
    (checkout / ".venv/leftover").touch()
    if damage == "killed":
        (checkout / ".venv/.unfinished").touch()
    elif damage == "without python":
        (checkout / ".venv/bin/python").unlink()
    run(checkout, "scripts/setup", "run", HAS_NO_PIP="1" if damage == "without pip" else "0")
    assert any("venv --clear" in line for line in calls(checkout))
    assert not (checkout / ".venv/leftover").exists()


def test_make_sets_up_once(checkout: Path) -> None:
    assert run(checkout, "make", "demo").returncode == 0
    assert len(pip_calls(checkout)) == 2
    assert run(checkout, "make", "demo", "ARGS=--seed 2").returncode == 0
    assert calls(checkout) == ["-m smelt demo --seed 2"]


def test_make_sets_up_again_when_the_pins_change(checkout: Path) -> None:
    run(checkout, "make", "demo")
    stamp = (checkout / ".venv/.installed-run").stat().st_mtime
    os.utime(checkout / "constraints.txt", (stamp + 5, stamp + 5))
    calls(checkout)
    run(checkout, "make", "demo")
    assert len(pip_calls(checkout)) == 2


def test_make_repairs_a_set_up_that_was_killed(checkout: Path) -> None:
    run(checkout, "make", "demo")
    stamp = (checkout / ".venv/.installed-run").stat().st_mtime
    (checkout / ".venv/.unfinished").touch()
    os.utime(checkout / ".venv/.unfinished", (stamp + 5, stamp + 5))
    calls(checkout)
    assert run(checkout, "make", "demo").returncode == 0
    assert any("venv --clear" in line for line in calls(checkout))


def test_make_stops_where_the_set_up_failed(checkout: Path) -> None:
    result = run(checkout, "make", "demo", IS_OLD="1")
    assert result.returncode == 2
    assert "error: no Python 3.11 or newer" in result.stderr
    assert not any("smelt demo" in line for line in calls(checkout))


def test_make_help_lists_every_target(checkout: Path) -> None:
    listed = run(checkout, "make").stdout
    for target in ("demo", "test", "check", "fix", "bench", "map", "clean", "help"):
        assert f"make {target} " in listed


@pytest.mark.slow  # makes a real environment
def test_a_real_pip_without_an_index(checkout: Path, tmp_path: Path) -> None:
    said = failure(
        checkout,
        PYTHON=sys.executable,
        PIP_CONFIG_FILE=os.devnull,
        PIP_INDEX_URL="http://127.0.0.1:9/simple",
        PIP_EXTRA_INDEX_URL="",
        PIP_FIND_LINKS="",
    )
    assert "no package index reachable; check the network" in said
