"""Where events go, and how ranks share a batch."""

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from smelt.errors import ConfigError, MissingDependency
from smelt.run_configs import TrainConfig
from smelt.training.metrics import EvalMetrics, Event, Note, RunInfo, RunSummary, StepMetrics, describe
from smelt.training.parallel import Ranks
from smelt.training.sinks import jsonl_sink, line_sink, tensorboard_sink, wandb_sink


def info(first_step: int, out_dir: Path) -> RunInfo:
    return RunInfo(TrainConfig(), out_dir, 1000, 500, 50, "toy", "cpu", "float32", first_step, 100, 1, compiled=False)


def step_event(step: int, loss: float = 2.0) -> StepMetrics:
    return StepMetrics(step, loss, 1e-3, 0.5, 1000.0, 0.4, 0.1)


def summary(step: int) -> RunSummary:
    return RunSummary("out", step, "done", 1.5, 1.5, 100, 1.0, 100.0, 0.4)


def rows(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_metrics_file_has_each_logged_step_once_after_a_resume(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = jsonl_sink(path, log_interval=10)
    for event in [info(0, tmp_path), *map(step_event, range(1, 46)), EvalMetrics(40, 2.0, 1.9, True, 50, False)]:
        first(event)
    with path.open("a") as torn:
        torn.write('{"kind": "step", "st')  # a kill in the middle of a line
    resumed = jsonl_sink(path, log_interval=10)
    for event in [info(20, tmp_path), *map(step_event, range(21, 41)), summary(40)]:
        resumed(event)
    assert [row["step"] for row in rows(path) if row["kind"] == "step"] == [1, 10, 20, 30, 40]
    assert [row["kind"] for row in rows(path)][-1] == "summary"


def test_a_new_run_starts_a_new_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "step", "step": 5}\n')
    jsonl_sink(path, 1)(info(0, tmp_path))
    assert rows(path) == [{"kind": "start", "step": 0, "num_steps": 100}]


def test_metrics_are_strict_json_even_for_infinite_figures(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = jsonl_sink(path, 1)
    sink(info(0, tmp_path))
    sink(step_event(1, math.inf))
    assert rows(path)[1]["loss"] is None


def test_lines_name_every_kind_of_event(tmp_path: Path) -> None:
    lines: list[str] = []
    sink = line_sink(lines.append, log_interval=2)
    events: list[Event] = [info(0, tmp_path), step_event(1), step_event(2), step_event(3), Note("a note"), summary(3)]
    for event in events:
        sink(event)
    assert [line.split()[0] for line in lines] == ["0.00M", "step", "step", "a", "done"]
    assert describe(EvalMetrics(4, 2.0, 1.9, True, 50, final=True)) == (
        "step 4: train loss 2.0000, val loss 1.9000 over all 50 tokens (best)"
    )


def test_tensorboard_receives_losses(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sink = tensorboard_sink(TrainConfig(log_interval=1), tmp_path)
    for event in (step_event(1, 2.5), EvalMetrics(1, 2.5, 2.25, True, 10, False), summary(1)):
        sink(event)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.value for event in events.Scalars("train/loss")] == [2.5]
    assert [event.value for event in events.Scalars("val/loss")] == [2.25]


def test_ranks_share_the_rows_in_order() -> None:
    shares = [Ranks(rank, 4).rows(12) for rank in range(4)]
    assert [row for share in shares for row in range(12)[share]] == list(range(12))


def test_rows_that_cannot_be_shared_are_refused() -> None:
    with pytest.raises(ConfigError, match="= 10 rows cannot be shared equally by 4 ranks"):
        Ranks(0, 4).rows(10)


def test_shards_have_every_rank_in_every_pass() -> None:
    shares = [["a", "b"], ["c"]]
    plain = [list(Ranks(rank, 2).passes(shares.__getitem__)) for rank in range(2)]
    assert plain == [[("a", True), ("b", True)], [("c", True)]]
    sharded = [list(Ranks(rank, 2, sharding="full").passes(shares.__getitem__)) for rank in range(2)]
    assert sharded == [plain[0], [("c", True), ("b", False)]]
    assert list(Ranks(1, 2, sharding="full").passes([["a"], []].__getitem__)) == [("a", False)]
    assert not Ranks(sharding="full").in_step, "one rank holds everything"


def test_wandb_receives_losses_and_is_closed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Against a stand-in: the service itself needs a network and an account."""
    logged: list[tuple[int, dict[str, float]]] = []
    finished: list[bool] = []
    run = SimpleNamespace(log=lambda values, step: logged.append((step, values)), finish=lambda: finished.append(True))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **_settings: run))
    sink = wandb_sink(TrainConfig(log_interval=2), tmp_path)
    for event in (step_event(2, 2.5), step_event(3), EvalMetrics(4, 2.5, 2.25, True, 10, False), summary(4)):
        sink(event)
    assert [step for step, _ in logged] == [2, 4]
    assert logged[0][1]["train/loss"] == 2.5
    assert logged[1][1] == {"val/loss": 2.25}
    assert finished == [True]


def test_a_missing_service_names_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MissingDependency, match=r"pip install 'smelt\[wandb\]'"):
        wandb_sink(TrainConfig(), tmp_path)
