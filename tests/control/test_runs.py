"""Runs by their folders: who is listed, in which state, with which curves; no training, only its files."""

import fcntl
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from smelt.configs import RUN_LOCK, RUN_LOG, RUN_METRICS
from smelt.control.run_folders import Entry, find_runs, is_training, register, write_entry
from smelt.control.run_metrics import LineFile, read_curves, thinned
from smelt.control.runs import STOPPED, Runs
from smelt.errors import NotFound
from smelt.run_configs import TrainConfig

STEP = {
    "kind": "step",
    "loss": 2.0,
    "learning_rate": 1e-3,
    "grad_norm": 1.0,
    "tokens_per_second": 100.0,
    "seconds": 0.5,
}


def step(number: int, **changes: Any) -> dict[str, Any]:
    return {**STEP, "step": number, **changes}


def evaluation(number: int, val_loss: float, final: bool = False) -> dict[str, Any]:
    return {"kind": "evaluation", "step": number, "val_loss": val_loss, "final": final}


def append(out_dir: Path, *events: dict[str, Any], name: str = RUN_METRICS) -> None:
    with (out_dir / name).open("a") as file:
        file.writelines(json.dumps(event) + "\n" for event in events)


class Home:
    """A home folder and runs that somebody seems to have started."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.runs = Runs(folder / "home" / "runs")

    def start(self, name: str = "out", **values: Any) -> tuple[Entry, Path]:
        out_dir = self.folder / name
        out_dir.mkdir(exist_ok=True)
        config = TrainConfig(**{"out_dir": str(out_dir), "max_iters": 100, **values})
        return register(config, self.runs.folder), out_dir


@pytest.fixture
def lab(tmp_path: Path) -> Home:
    return Home(tmp_path)


def test_a_run_is_running_while_its_folder_is_held_and_lost_when_it_is_let_go_without_a_word(lab: Home) -> None:
    entry, out_dir = lab.start()
    with (out_dir / RUN_LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        append(out_dir, step(10), evaluation(10, 2.5), step(20, loss=1.5))
        (status,) = lab.runs.all()
        assert (status.id, status.state, status.step, status.loss) == (entry.id, "running", 20, 1.5)
        assert (status.val_loss, status.tokens_per_second, status.seconds_left) == (2.5, 100.0, 40.0)
    status = lab.runs.status(entry.id)
    assert (status.state, status.seconds_left) == ("failed", None)
    assert "resumed" in status.reason


@pytest.mark.parametrize(
    ("ending", "state", "reason"),
    [
        ({"kind": "summary", "stop_reason": "done"}, "succeeded", ""),
        ({"kind": "summary", "stop_reason": "max_time"}, "succeeded", ""),
        ({"kind": "summary", "stop_reason": "interrupted"}, "cancelled", STOPPED),
        ({"kind": "failure", "message": "the loss became nan"}, "failed", "the loss became nan"),
        ({"kind": "cancelled"}, "cancelled", ""),
    ],
)
def test_the_last_event_says_how_a_run_ended(lab: Home, ending: dict[str, Any], state: str, reason: str) -> None:
    entry, out_dir = lab.start()
    append(out_dir, step(1), ending)
    status = lab.runs.status(entry.id)
    assert (status.state, status.reason) == (state, reason)


def test_a_run_that_was_asked_for_and_has_not_begun_is_queued(lab: Home) -> None:
    out_dir = lab.runs.folder / "run-000000000001"
    entry = Entry(id=out_dir.name, owner="ada", recipe="pretrain", config={}, created=1.0, future_id="f")
    write_entry(entry, out_dir, lab.runs.folder)
    assert lab.runs.status(entry.id).state == "queued"
    begun = register(TrainConfig(out_dir=str(out_dir)), lab.runs.folder)
    assert (begun.id, begun.owner, begun.future_id, begun.created) == (entry.id, "ada", "f", 1.0)
    assert begun.started is not None


def test_asking_whether_a_folder_is_held_leaves_it_free(lab: Home) -> None:
    _, out_dir = lab.start()
    assert not is_training(out_dir)
    with (out_dir / RUN_LOCK).open("w") as lock:
        assert not is_training(out_dir)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert is_training(out_dir)


def test_a_resumed_run_keeps_its_id_and_what_it_began_with(lab: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    first, out_dir = lab.start(dataset="words", max_iters=10)
    resumed, _ = lab.start(dataset="words", init_from="resume", max_iters=20)
    assert (resumed.id, resumed.created) == (first.id, first.created)
    assert (resumed.config["init_from"], resumed.config["max_iters"]) == ("scratch", 20)
    assert len(find_runs(lab.runs.folder)) == 1


def test_another_run_in_the_same_folder_takes_the_place_of_the_old_one(lab: Home) -> None:
    old, out_dir = lab.start()
    append(out_dir, step(50))
    shutil.rmtree(out_dir)
    new, _ = lab.start()
    assert [status.id for status in lab.runs.all()] == [new.id] != [old.id]
    assert lab.runs.status(new.id).step == 0
    with pytest.raises(NotFound, match=old.id):
        lab.runs.status(old.id)


def test_a_removed_folder_vanishes_from_the_list_and_damaged_files_hide_only_their_run(lab: Home) -> None:
    _, gone = lab.start("gone")
    _, damaged = lab.start("damaged")
    kept, _ = lab.start("kept")
    shutil.rmtree(gone)
    (damaged / "run.json").write_text("{")
    (lab.runs.folder / ".registry" / "run-00000000000f.json").write_text("nonsense")
    assert [status.id for status in lab.runs.all()] == [kept.id]


@pytest.mark.parametrize("run_id", ["run-0", "../../out", "run-00000000000g", ""])
def test_what_is_no_id_of_a_run_is_not_found(lab: Home, run_id: str) -> None:
    with pytest.raises(NotFound):
        lab.runs.status(run_id)


def test_owners_see_their_own_runs_only(lab: Home) -> None:
    mine, _ = lab.start()
    assert [status.id for status in lab.runs.all("local")] == [mine.id]
    assert lab.runs.all("eve") == []
    for ask in (lab.runs.status, lab.runs.show, lab.runs.curves):
        with pytest.raises(NotFound):
            ask(mine.id, "eve")
    with pytest.raises(NotFound):
        lab.runs.log(mine.id, 10, "eve")


def test_a_run_is_shown_with_its_config_and_the_command_that_repeats_it(
    lab: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my text.txt").write_text("words")
    entry, out_dir = lab.start(
        data_path="my text.txt", max_iters=7, betas=(0.9, 0.98), decay_lr=False, tokenizer="char"
    )
    shown = lab.runs.show(entry.id)
    assert yaml.safe_load(shown.config_yaml)["data_path"] == str(tmp_path / "my text.txt")
    assert shown.command_line == (
        f"smelt train --data-path '{tmp_path}/my text.txt' --tokenizer char --max-iters 7 --decay-lr false "
        f"--betas 0.9,0.98 --out-dir {out_dir}-again"
    )


def test_the_log_gives_its_last_lines(lab: Home) -> None:
    entry, out_dir = lab.start()
    assert lab.runs.log(entry.id, 5).lines == []
    (out_dir / RUN_LOG).write_text("one\ntwo\nthree\nhal")
    assert lab.runs.log(entry.id, 2).lines == ["two", "three"]


def test_a_glance_follows_a_file_that_is_written_anew(lab: Home) -> None:
    entry, out_dir = lab.start()
    append(out_dir, *(step(number) for number in range(1, 501)), {"kind": "summary", "stop_reason": "interrupted"})
    before = lab.runs.status(entry.id)
    assert (before.step, before.state) == (500, "cancelled")
    assert 30 <= len(before.spark) <= 60
    (out_dir / RUN_METRICS).write_text("")
    append(out_dir, step(1), step(2, loss=9.0))
    after = lab.runs.status(entry.id)
    assert (after.step, after.state, after.spark) == (2, "failed", [2.0, 9.0])


def test_lines_are_read_whole_and_a_rewrite_is_noticed_even_when_the_file_has_outgrown_the_old_one(
    tmp_path: Path,
) -> None:
    path = tmp_path / "lines"
    file = LineFile(path)
    assert file.read() == []
    path.write_bytes(b"one\nhal")
    assert file.read() == [b"one\n"]
    with path.open("ab") as more:
        more.write(b"f\nthree\n")
    again = LineFile(path, file.cursor)
    assert file.read(until=9) == [b"half\n"]
    assert file.read() == [b"three\n"]
    assert again.read() == [b"half\n", b"three\n"]
    path.write_bytes(b"other lines\nthat are longer\nthan the old ones\n")
    assert file.read() is None
    assert file.read() == [b"other lines\n", b"that are longer\n", b"than the old ones\n"]
    path.unlink()
    assert file.read() is None
    assert file.read() == []


@pytest.mark.parametrize("cursor", ["", "x.y.z", "1.2.3", "-1.0.0", "5.-1.0", "1.1"])
def test_what_is_no_cursor_is_refused(tmp_path: Path, cursor: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 the message is Python's own for most of them
        LineFile(tmp_path / "lines", cursor)


def test_curves_have_a_row_per_step_and_evaluation_and_skip_what_is_no_event(tmp_path: Path) -> None:
    path = tmp_path / RUN_METRICS
    append(
        tmp_path, step(1), evaluation(1, 3.0), step(2, loss=None), evaluation(2, 2.0), evaluation(2, 2.1, final=True)
    )
    with path.open("a") as file:
        file.write('{"kind": "step", "step": 3, "loss": NaN}\nnonsense\n{"kind": "step", "st')
    curves = read_curves(path)
    assert (curves.train.step, curves.train.loss) == ([1, 2], [2.0, None])
    assert (curves.validation.step, curves.validation.loss) == ([1, 2], [3.0, 2.0])


def test_a_long_curve_is_thinned_and_keeps_its_ends_its_dips_and_its_peaks() -> None:
    values: list[float | None] = [float(number % 7) for number in range(100_000)]
    values[31_415], values[92_653] = 1000.0, -1000.0
    values[50_000] = None
    kept = thinned(values, 2000)
    assert 1900 <= len(kept) <= 2000
    assert {0, 31_415, 92_653, 99_999} <= set(kept)
    assert kept == sorted(set(kept))
    assert thinned([None] * 3000, 2000) == [0, 2999]


def test_what_is_kept_of_a_run_is_listed_newest_first(lab: Home) -> None:
    entry, out_dir = lab.start()
    assert lab.runs.checkpoints(entry.id) == []
    for number in (10, 20):
        folder = out_dir / "checkpoints" / f"step-{number:07}"
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(b"12345")
    (out_dir / "checkpoints" / ".tmp-step-0000030").mkdir()
    (out_dir / "best").symlink_to("checkpoints/step-0000010")
    (out_dir / "last").symlink_to("checkpoints/step-0000020")
    newest, oldest = lab.runs.checkpoints(entry.id)
    assert (newest.step, newest.num_bytes, newest.is_best, newest.is_last) == (20, 5, False, True)
    assert (oldest.step, oldest.name, oldest.is_best, oldest.is_last) == (10, "step-0000010", True, False)
    with pytest.raises(NotFound):
        lab.runs.checkpoints(entry.id, "eve")
