"""Whole runs on a tiny text: learning, stopping and resuming to the same bits, and every way of starting."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ranks import train_on_two_ranks
from smelt.errors import AlreadyExists, CheckpointError, ConfigError, NonFiniteLoss, NotEnoughData, NotFound
from smelt.run_configs import TrainConfig, resumed_values
from smelt.training import loop
from smelt.training.metrics import EvalMetrics, Event, Note, RunSummary, StepMetrics
from smelt.training.pretraining import pretrain
from smelt.training.step import LossValue, step
from stopping import stop_at

TEXT = "".join(f"line {number}: the quick brown fox jumps over {number * 7} lazy dogs.\n" for number in range(400))
TINY: dict[str, Any] = {
    "tokenizer": "bytes",
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 16,
    "block_size": 16,
    "batch_size": 4,
    "max_iters": 20,
    "eval_interval": 5,
    "eval_iters": 2,
    "log_interval": 1,
    "learning_rate": 1e-2,
    "threads": 1,
    "dropout": 0.1,
    "dtype": "float32",  # where bf16 is fast, `auto` would take it, and its sums differ with the number of rows
}


class Lab:
    """A folder with a text, a place for datasets and models, and runs in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.text = folder / "input.txt"
        self.text.write_text(TEXT)

    def config(self, out: str, **changes: Any) -> TrainConfig:
        return TrainConfig(**{**TINY, "data_path": str(self.text), "out_dir": str(self.folder / out), **changes})

    def train(self, config: TrainConfig, sink: Callable[[Event], None] | None = None) -> RunSummary:
        return pretrain(config, self.folder / "datasets", self.folder / "models", [sink] if sink else [])

    def resume(self, out: str, sink: Callable[[Event], None] | None = None, **changes: Any) -> RunSummary:
        values = resumed_values({"out_dir": str(self.folder / out), "init_from": "resume", **changes})
        return self.train(TrainConfig(**values), sink)

    def tensors(self, out: str) -> tuple[bytes, bytes]:
        last = self.folder / out / "last"
        return (last / "model.safetensors").read_bytes(), (last / "optimizer.safetensors").read_bytes()

    def losses(self, out: str) -> list[tuple[int, float]]:
        lines = (self.folder / out / "metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        return [(row["step"], row["loss"]) for row in rows if row["kind"] == "step"]


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path)


def test_a_run_learns_and_leaves_a_model(lab: Lab) -> None:
    summary = lab.train(lab.config("out", max_iters=60, eval_interval=20, dropout=0.0))
    losses = [loss for _, loss in lab.losses("out")]
    assert losses[0] == pytest.approx(5.55, abs=0.15), "an untrained model knows nothing: log(257)"
    assert losses[-1] < 4.0
    assert summary.stop_reason == "done"
    assert summary.val_loss is not None
    assert summary.val_loss < 4.0
    assert {path.name for path in (lab.folder / "out" / "best").iterdir()} >= {"config.json", "model.safetensors"}


@pytest.mark.parametrize("stop", [1, 7, 10])
def test_stopping_anywhere_and_resuming_gives_the_same_bits(lab: Lab, stop: int) -> None:
    lab.train(lab.config("whole"))
    stopped = lab.train(lab.config("parts"), stop_at(stop))
    assert (stopped.stop_reason, stopped.step) == ("interrupted", stop)
    lab.resume("parts")
    assert lab.tensors("parts") == lab.tensors("whole")
    assert lab.losses("parts") == lab.losses("whole")


@pytest.mark.parametrize("stop", [0, 5, 7], ids=["in the first step", "behind a checkpoint", "between checkpoints"])
def test_a_step_of_many_passes_is_given_up_and_done_on_resuming(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    changes = {"gradient_accumulation_steps": 3, "max_iters": 10}
    lab.train(lab.config("whole", **changes))
    passes = iter(range(1000))

    def stopping(*given: Any) -> LossValue:
        if next(passes) == 3 * stop + 1:
            os.kill(os.getpid(), signal.SIGINT)
        return step(*given)

    monkeypatch.setattr(loop, "step", stopping)
    stopped = lab.train(lab.config("parts", **changes))
    assert (stopped.stop_reason, stopped.step) == ("interrupted", stop)
    assert lab.resume("parts").step == 10
    assert lab.tensors("parts") == lab.tensors("whole")
    assert lab.losses("parts") == lab.losses("whole")


def test_resuming_with_accumulation_and_low_precision_gives_the_same_bits(lab: Lab) -> None:
    changes = {"gradient_accumulation_steps": 3, "dtype": "bfloat16", "max_iters": 8}
    lab.train(lab.config("whole", **changes))
    lab.train(lab.config("parts", **changes), stop_at(3))
    lab.resume("parts")
    assert lab.tensors("parts") == lab.tensors("whole")


def test_fp16_trains_with_a_loss_scale_and_resumes(lab: Lab) -> None:
    lab.train(lab.config("whole", dtype="float16", max_iters=12))
    lab.train(lab.config("parts", dtype="float16", max_iters=12), stop_at(5))
    lab.resume("parts")
    assert lab.tensors("parts") == lab.tensors("whole")
    assert lab.losses("whole")[-1][1] < lab.losses("whole")[0][1]


def test_killed_without_warning_a_run_goes_on_from_its_last_checkpoint(lab: Lab) -> None:
    lab.train(lab.config("whole", max_iters=300, eval_interval=10))
    flags = lab.config("parts", max_iters=300, eval_interval=10).model_dump(
        mode="json", exclude_none=True, exclude={"recipe"}
    )
    flags["betas"] = "0.9,0.95"
    arguments = [part for name, value in flags.items() for part in (f"--{name.replace('_', '-')}", str(value).lower())]
    arguments[arguments.index("--data-path") + 1] = str(lab.text)
    arguments[arguments.index("--out-dir") + 1] = str(lab.folder / "parts")
    environment = {**os.environ, "SMELT_HOME": str(lab.folder)}
    command = [sys.executable, "-m", "smelt", "train", *arguments]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("step 60:") and "val loss" in line:
                process.send_signal(signal.SIGKILL)
                break
        process.stderr.read()
    assert process.returncode == -signal.SIGKILL
    resumed_from: list[int] = []
    lab.resume("parts", lambda event: resumed_from.append(event.step) if isinstance(event, StepMetrics) else None)
    assert 40 <= resumed_from[0] - 1 < 300, "the save of step 50 had begun, so that of step 40 was whole"
    assert lab.losses("parts") == lab.losses("whole")
    assert lab.tensors("parts") == lab.tensors("whole")


def test_a_resumed_run_may_be_made_longer(lab: Lab) -> None:
    lab.train(lab.config("out", max_iters=10))
    summary = lab.resume("out", max_iters=15)
    assert summary.step == 15
    assert [step for step, _ in lab.losses("out")] == list(range(1, 16))


def test_a_changed_setting_that_changes_bits_is_said(lab: Lab) -> None:
    lab.train(lab.config("out", max_iters=5))
    notes: list[str] = []
    lab.resume("out", lambda e: notes.append(e.text) if isinstance(e, Note) else None, max_iters=6, dtype="bfloat16")
    assert notes == ["resuming, but not bit for bit: dtype was float32, is bfloat16"]


def test_other_data_under_a_resumed_run_is_refused(lab: Lab) -> None:
    lab.train(lab.config("out", max_iters=5))
    lab.text.write_text(TEXT.upper())
    shutil.rmtree(lab.folder / "datasets")
    with pytest.raises(CheckpointError, match="trained on other data"):
        lab.resume("out", max_iters=6)


def test_nothing_to_resume_names_the_file_it_wants(lab: Lab) -> None:
    with pytest.raises(NotFound, match=r"nothing to resume: .*nowhere/config\.yaml"):
        lab.resume("nowhere")


def test_an_existing_run_is_not_overwritten(lab: Lab) -> None:
    lab.train(lab.config("out", max_iters=5))
    with pytest.raises(AlreadyExists, match="already holds a run"):
        lab.train(lab.config("out", max_iters=5))


def test_a_diverging_run_stops_and_names_step_documents_and_checkpoint(lab: Lab) -> None:
    def poison(event: Event) -> None:
        if isinstance(event, StepMetrics) and event.step == 7:
            for parameter in models[0].parameters():
                parameter.data.fill_(float("nan"))

    models: list[torch.nn.Module] = []
    original = torch.nn.Module.train

    def remember(self: torch.nn.Module, mode: bool = True) -> torch.nn.Module:
        if type(self).__name__ == "Decoder" and not models:
            models.append(self)
        return original(self, mode)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.Module, "train", remember)
        with pytest.raises(NonFiniteLoss, match=r"at step 8, .* documents 0; the last good checkpoint is step 5"):
            lab.train(lab.config("out"), poison)
    summary = lab.resume("out", max_iters=6)
    assert summary.step == 6


def test_max_time_ends_the_run_with_a_checkpoint(lab: Lab) -> None:
    summary = lab.train(lab.config("out", max_iters=100_000, max_time=0.2))
    assert summary.stop_reason == "max_time"
    assert 0 < summary.step < 100_000
    assert (lab.folder / "out" / "last").resolve().name == f"step-{summary.step:08d}"


def test_fine_tuning_starts_from_a_models_weights_and_tokenizer(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(lab.folder)
    lab.train(lab.config("base", max_iters=40, dropout=0.0))
    shapeless = dict.fromkeys(("n_layer", "n_head", "n_embd", "tokenizer"))
    config = lab.config("base", init_from=str(lab.folder / "base"), **shapeless, max_iters=2).replace(out_dir=None)
    events: list[Event] = []
    summary = lab.train(config, events.append)
    assert summary.out_dir == "out-base"
    first = next(event for event in events if isinstance(event, StepMetrics))
    assert first.loss < 4.5, "it must not begin from scratch"


def test_a_models_shape_cannot_be_changed(lab: Lab) -> None:
    lab.train(lab.config("base", max_iters=5))
    with pytest.raises(ConfigError, match=r"--n-layer, --n-head, --n-embd cannot change the shape"):
        lab.train(lab.config("tuned", init_from=str(lab.folder / "base")))


def test_evaluating_only_writes_nothing(lab: Lab) -> None:
    lab.train(lab.config("base", max_iters=5))
    before = sorted(lab.folder.rglob("*"))
    evaluations: list[EvalMetrics] = []
    summary = lab.resume(
        "base", lambda e: evaluations.append(e) if isinstance(e, EvalMetrics) else None, eval_only=True
    )
    assert summary.val_loss == evaluations[0].val_loss
    assert sorted(lab.folder.rglob("*")) == before


def test_no_data_and_too_little_data_are_clear_errors(lab: Lab) -> None:
    with pytest.raises(ConfigError, match="no data to train on"):
        lab.train(lab.config("out", data_path=None))
    lab.text.write_text("too short")
    with pytest.raises(NotEnoughData):
        lab.train(lab.config("out"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # from inside torch.compile
def test_compiled_training_learns_the_same(lab: Lab) -> None:
    lab.train(lab.config("eager", max_iters=4, dropout=0.0))
    lab.train(lab.config("fast", max_iters=4, dropout=0.0, compile="true"))
    for (_, one), (_, other) in zip(lab.losses("eager"), lab.losses("fast"), strict=True):
        assert one == pytest.approx(other, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("accumulation", "sharding"),
    [(1, "none"), (3, "none"), (1, "full"), (4, "full"), (1, "optimizer"), (4, "optimizer")],
)
def test_two_ranks_train_as_one_process_does(lab: Lab, accumulation: int, sharding: str) -> None:
    changes = {"max_iters": 10, "dropout": 0.0, "gradient_accumulation_steps": accumulation}
    config = lab.config("two", **changes, sharding=sharding)
    lab.train(lab.config("one", **changes))
    lab.folder.joinpath("run.json").write_text(config.model_dump_json())
    train_on_two_ranks(["--config", str(lab.folder / "run.json")], lab.folder, OMP_NUM_THREADS="1")
    one, two = lab.losses("one"), lab.losses("two")
    assert [step for step, _ in two] == list(range(1, 11)), "rank 0 alone writes"
    for (_, alone), (_, shared) in zip(one, two, strict=True):
        assert alone == pytest.approx(shared, abs=1e-5)
