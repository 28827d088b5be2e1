"""Runs leave word for others: they are registered when they begin, keep a log, and say how they ended."""

import fcntl
import threading
from pathlib import Path
from typing import Any

import pytest

import smelt
from ranks import train_on_two_ranks
from smelt.configs import RUN_LOCK, RUN_LOG
from smelt.control.runs import Runs, RunStatus
from smelt.errors import AlreadyExists, NotEnoughData
from smelt.run_configs import TrainConfig
from smelt.training import pretraining
from smelt.training.parallel import Ranks
from smelt.training.run_setup import own_folder

TEXT = "".join(f"Line {number} says that {number} and {number + 1} are neighbours.\n" for number in range(200))
TINY: dict[str, Any] = {
    "tokenizer": "bytes",
    "n_layer": 1,
    "n_head": 2,
    "n_embd": 8,
    "block_size": 16,
    "batch_size": 2,
    "max_iters": 4,
    "eval_interval": 2,
    "eval_iters": 1,
    "log_interval": 1,
    "device": "cpu",
    "dtype": "float32",
    "compile": "false",
}


@pytest.fixture
def text(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    Path("input.txt").write_text(TEXT)
    return "input.txt"


def runs_of(home: Path) -> list[RunStatus]:
    return Runs(home / "runs").all()


def test_a_run_is_found_with_its_end_and_its_log_and_keeps_its_id_when_it_goes_on(home: Path, text: str) -> None:
    smelt.train(TINY, data_path=text)
    (first,) = runs_of(home)
    assert (first.state, first.step, first.owner, first.out_dir) == (
        "succeeded",
        4,
        "local",
        str(Path("out").absolute()),
    )
    smelt.train(out_dir="out", init_from="resume", max_iters=6)
    (resumed,) = runs_of(home)
    assert (resumed.id, resumed.state, resumed.step) == (first.id, "succeeded", 6)
    log = Path("out", RUN_LOG).read_text()
    assert [number for number in range(1, 7) if f"step {number}: loss" in log] == [1, 2, 3, 4, 5, 6]
    assert log.count("done at step") == 2


def test_a_run_is_found_before_its_data_is_ready(home: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    states = []
    original = pretraining.open_data

    def look_first(*given: Any) -> Any:
        states.append([status.state for status in runs_of(home)])
        return original(*given)

    monkeypatch.setattr(pretraining, "open_data", look_first)
    smelt.train(TINY, data_path=text)
    assert states == [["running"]]


def test_an_error_is_what_a_failed_run_says(home: Path, text: str) -> None:
    Path(text).write_text("too short")
    with pytest.raises(NotEnoughData) as error:
        smelt.train(TINY, data_path=text)
    (status,) = runs_of(home)
    assert (status.state, status.reason) == ("failed", str(error.value))


def test_ctrl_c_before_the_first_step_cancels(home: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_given: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pretraining, "open_data", interrupt)
    with pytest.raises(KeyboardInterrupt):
        smelt.train(TINY, data_path=text)
    assert [status.state for status in runs_of(home)] == ["cancelled"]


def test_a_refused_run_and_an_evaluation_leave_the_list_as_it_is(home: Path, text: str) -> None:
    smelt.train(TINY, data_path=text)
    before = runs_of(home)
    with pytest.raises(AlreadyExists):
        smelt.train(TINY, data_path=text)
    smelt.train(TINY, data_path=text, init_from="out", out_dir="other", eval_only=True, **dict.fromkeys(SHAPE))
    assert runs_of(home) == before


SHAPE = ("n_layer", "n_head", "n_embd")


def test_somebody_who_looks_at_the_lock_does_not_keep_a_run_from_starting(tmp_path: Path) -> None:
    config = TrainConfig(out_dir=str(tmp_path))
    with (tmp_path / RUN_LOCK).open("w") as reader:
        fcntl.flock(reader, fcntl.LOCK_SH)
        threading.Timer(0.05, lambda: fcntl.flock(reader, fcntl.LOCK_UN)).start()
        with (
            own_folder(config, Ranks(0, 1)),
            pytest.raises(AlreadyExists, match="another process"),
            own_folder(config, Ranks(0, 1)),
        ):
            raise AssertionError("two runs in one folder")


@pytest.mark.slow
def test_two_ranks_are_one_run(home: Path, text: str) -> None:
    flags = [word for name, value in TINY.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    train_on_two_ranks(["--data-path", text, *flags], home)
    assert [(status.state, status.step) for status in runs_of(home)] == [("succeeded", 4)]
