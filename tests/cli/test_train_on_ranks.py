"""`smelt train --ranks 2` as people use it: the same losses as alone, stopped, resumed with another number, killed."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from processes import all_below, children_of, eventually, is_alive, needs_proc

pytestmark = [pytest.mark.slow, needs_proc, pytest.mark.timeout(300)]

TEXT = "".join(f"Line {number} says that {number} and {number + 1} are neighbours.\n" for number in range(200))
TINY: dict[str, Any] = {
    "data_path": "input.txt",
    "tokenizer": "bytes",
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 16,
    "block_size": 16,
    "batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_iters": 12,
    "eval_interval": 6,
    "eval_iters": 2,
    "log_interval": 1,
    "learning_rate": 1e-2,
    "decay_lr": False,
    "warmup_iters": 0,
    "device": "cpu",
    "dtype": "float32",
    "compile": "false",
    "threads": 1,
}
FOREVER = {"max_iters": 10**6, "eval_interval": 50, "log_interval": 1000}

Process = subprocess.Popen[str]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "input.txt").write_text(TEXT)
    return tmp_path


def start(folder: Path, out: str, *flags: str, **changes: Any) -> Process:
    (folder / f"{out}.json").write_text(json.dumps({**TINY, **changes}))
    command = [sys.executable, "-m", "smelt", "train", "--config", f"{out}.json", "--out-dir", out, *flags]
    environment = {**os.environ, "SMELT_HOME": str(folder / "home")}
    return subprocess.Popen(command, cwd=folder, env=environment, text=True, stderr=subprocess.PIPE)


def finish(process: Process, code: int = 0) -> str:
    """What it said on its way to that exit code."""
    said = process.communicate(timeout=240)[1]
    assert process.returncode == code, said
    return said


def losses(folder: Path, out: str) -> dict[int, float]:
    rows = map(json.loads, (folder / out / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row["loss"] for row in rows if row["kind"] == "step"}


def checkpoint(folder: Path, out: str, after: str = "") -> str:
    return eventually(
        lambda: max((p.name for p in (folder / out).glob("checkpoints/step-*") if p.name > after), default=""),
        "a checkpoint",
        120,
    )


def ranks_of(process: Process) -> list[int]:
    return [pid for child in children_of(process.pid) for pid in children_of(child)]


@pytest.mark.parametrize(("sharding", "differs"), [("none", ""), ("full", "; sharding was none, is full")])
def test_two_ranks_then_one_then_two_have_the_losses_of_one(folder: Path, sharding: str, differs: str) -> None:
    finish(start(folder, "alone"))
    assert "on 2 ranks" in finish(start(folder, "changing", "--ranks", "2", max_iters=5, sharding=sharding))
    finish(start(folder, "changing", "--init-from", "resume", "--ranks", "1", "--max-iters", "9"))
    resume = ("--init-from", "resume", "--ranks", "2", "--sharding", sharding)
    said = finish(start(folder, "changing", *resume, "--max-iters", "12"))
    assert f"resuming, but not bit for bit: world_size was 1, is 2{differs}\n" in said
    assert list(losses(folder, "alone")) == list(range(1, 13))
    assert losses(folder, "changing") == pytest.approx(losses(folder, "alone"), abs=1e-5)


def test_ctrl_c_saves_once_and_says_how_to_go_on(folder: Path) -> None:
    process = start(folder, "stopped", "--ranks", "2", **FOREVER)
    checkpoint(folder, "stopped")
    process.send_signal(signal.SIGINT)
    said = finish(process, 130)
    assert said.count("continue with: smelt train --init-from resume --out-dir stopped") == 1
    assert "Traceback" not in said


def test_ctrl_c_before_the_first_step_is_no_death(folder: Path) -> None:
    process = start(folder, "early", "--ranks", "2", **FOREVER)
    eventually(lambda: children_of(process.pid), "the server that ranks are forked from", 60)
    process.send_signal(signal.SIGINT)
    assert "died" not in finish(process, 130)


@pytest.mark.parametrize("sharding", ["none", "full"])
def test_a_killed_rank_does_not_end_the_run_and_a_killed_starter_does(folder: Path, sharding: str) -> None:
    process = start(folder, "killed", "--ranks", "2", **FOREVER, sharding=sharding)
    reached = checkpoint(folder, "killed")
    killed = max(ranks_of(process))
    os.kill(killed, signal.SIGKILL)
    eventually(lambda: killed not in ranks_of(process) and len(ranks_of(process)) == 2, "two new ranks", 60)
    checkpoint(folder, "killed", after=reached)
    below = all_below(process.pid)
    process.kill()
    process.communicate()
    eventually(lambda: not [pid for pid in below if is_alive(pid)], "the end of all ranks", 30)


def test_a_mistake_is_told_once(folder: Path) -> None:
    said = finish(start(folder, "wrong", "--ranks", "2", batch_size=1, gradient_accumulation_steps=3), 2)
    assert said.count("cannot be shared equally by 2 ranks") == 1
    assert "Traceback" not in said
