"""Two hosts train one model by torch elastic; one is killed, and the other goes on. Needs network namespaces."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

import smelt
from netns import Host, two_hosts, why_not
from processes import eventually

TEXT = "".join(f"Line {number} says that {number} and {number + 1} are neighbours.\n" for number in range(200))
CONFIG: dict[str, Any] = {
    "data_path": "input.txt",
    "tokenizer": "bytes",
    "n_layer": 1,
    "n_head": 1,
    "n_embd": 16,
    "block_size": 16,
    "batch_size": 4,
    "max_iters": 10**6,
    "eval_interval": 50,
    "eval_iters": 1,
    "log_interval": 1,
    "device": "cpu",
    "dtype": "float32",
    "compile": "false",
    "decay_lr": False,
    "warmup_iters": 0,
    "threads": 1,
    "out_dir": "out",
    "resume_if_begun": True,
}
NUM_COMPARED = 20  # steps; later ones drift apart by the order in which ranks' sums are rounded


def agent(host: Host, first: Host) -> list[str]:
    """torchrun's agent, as `examples/elastic.sh` starts it."""
    settings = f"last_call_timeout=5,is_host={int(host is first)}"
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "1:2", "--nproc-per-node", "1"),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", f"{first.address}:29400", "--rdzv-id", "run"),
        *("--rdzv-conf", settings, "--local-addr", host.address, "--max-restarts", "5"),
    ]


def losses(folder: Path) -> dict[int, float]:
    """By step; the last line may be being written."""
    path = folder / "out/metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return {row["step"]: row["loss"] for row in rows if row["kind"] == "step"}


def starts(folder: Path) -> list[int]:
    """On how many ranks each life of the run was, as its log says."""
    log = folder / "out/log.txt"
    said = re.findall(r"validation tokens; cpu float32(?:, on (\d) ranks)?", log.read_text()) if log.exists() else []
    return [int(num_ranks or 1) for num_ranks in said]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_run_goes_on_when_a_host_is_killed(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if reason := why_not():
        pytest.skip(reason)
    (tmp_path / "input.txt").write_text(TEXT)
    (tmp_path / "run.json").write_text(json.dumps(CONFIG))
    agents = []
    with two_hosts() as (first, second):
        for host in (first, second):
            command = [*agent(host, first), "-m", "smelt", "train", "--config", "run.json"]
            agents.append(
                host.start(command, tmp_path, tmp_path / f"{host.name}.log", SMELT_HOME=str(home), OMP_NUM_THREADS="1")
            )
        eventually(lambda: starts(tmp_path)[-1:] == [2], "a run on both hosts", 180)
        reached = max(losses(tmp_path), default=0)
        eventually(lambda: max(losses(tmp_path), default=0) > reached + 100, "a checkpoint of both", 120)
        second.kill()
        eventually(lambda: starts(tmp_path)[-1:] == [1], "a run on the host that is left", 180)
        reached = max(losses(tmp_path))
        eventually(lambda: max(losses(tmp_path)) > reached + 100, "its steps", 120)
        found = losses(tmp_path)
    for killed in agents:
        killed.wait(30)
    assert list(found) == list(range(1, max(found) + 1)), "each step once"
    monkeypatch.chdir(tmp_path)
    smelt.train(CONFIG, out_dir="alone", max_iters=NUM_COMPARED, resume_if_begun=False)
    rows = map(json.loads, Path("alone/metrics.jsonl").read_text().splitlines())
    alone = {row["step"]: row["loss"] for row in rows if row["kind"] == "step"}
    assert {step: found[step] for step in alone} == pytest.approx(alone, abs=1e-5)
