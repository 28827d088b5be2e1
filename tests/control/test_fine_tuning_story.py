"""What a job tells is what its run's lines say: each step once, figures under OpenAI's names, an end for every end."""

import csv
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from smelt.control.fine_tuning_story import events_of, read_story, table_of
from smelt.storage.records import FineTuningJob

JOB = FineTuningJob(owner="ann", id="ftjob-1", created=100.0, model="base", request={"training_file": "file-1"})
LINES: list[dict[str, Any] | str] = [
    {"kind": "start", "step": 0, "num_steps": 3},
    {"kind": "step", "step": 1, "loss": 2.0, "tokens_per_second": 10.0, "seconds": 2.0, "figures": {"accuracy": 0.25}},
    {"kind": "note", "text": "no compiler"},
    {"kind": "step", "step": 2, "loss": 1.5, "tokens_per_second": 10.0, "seconds": 4.0, "figures": {"accuracy": 0.5}},
    {"kind": "evaluation", "step": 2, "val_loss": 1.75, "figures": {"accuracy": 0.4, "margin": 0.1}},
    "of another program",
    {"kind": "step", "step": 3, "loss": None, "tokens_per_second": 10.0, "seconds": 1.0},
    {"kind": "evaluation", "step": 3, "val_loss": 1.25, "final": True},
]


@pytest.fixture
def metrics(tmp_path: Path) -> Path:
    path = tmp_path / "metrics.jsonl"
    whole = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in LINES)
    path.write_text(whole + '{"kind": "step", "step": 4, "lo')  # it is being written
    return path


def test_steps_have_their_figures_and_the_time_they_took(metrics: Path) -> None:
    story = read_story(metrics, started=1000.0)
    assert (story.num_steps, story.num_tokens) == (3, 70.0)
    assert {step: figures.values for step, figures in story.steps.items()} == {
        1: {"train_loss": 2.0, "train_mean_token_accuracy": 0.25},
        2: {
            "train_loss": 1.5,
            "train_mean_token_accuracy": 0.5,
            "valid_loss": 1.75,
            "valid_mean_token_accuracy": 0.4,
            "valid_margin": 0.1,
        },
        3: {"train_loss": None, "full_valid_loss": 1.25},
    }
    assert [figures.created for figures in story.steps.values()] == [1002.0, 1006.0, 1007.0]


def test_the_table_leaves_empty_what_was_not_measured(metrics: Path) -> None:
    rows = list(csv.DictReader(io.StringIO(table_of(read_story(metrics, 0.0)).decode())))
    assert [(row["step"], row["train_loss"], row["valid_loss"], row["full_valid_loss"]) for row in rows] == [
        ("1", "2.0", "", ""),
        ("2", "1.5", "1.75", ""),
        ("3", "", "", "1.25"),
    ]
    assert rows[1]["valid_margin"] == "0.1"


def test_events_come_in_order_and_keep_their_places(metrics: Path) -> None:
    story = read_story(metrics, 1000.0)
    running = replace(JOB, run_id="run-1")
    told = events_of(running, story, 1000.0)
    assert [event.message for event in told] == [
        "Created fine-tuning job: ftjob-1",
        "Validating training file: file-1",
        "Files validated, moving job to queued state",
        "Fine-tuning job started",
        "no compiler",
        "Step 1/3: training loss=2.00",
        "Step 2/3: training loss=1.50, validation loss=1.75",
        "Step 3/3: full validation loss=1.25",
    ]
    assert told[6].data == {"step": 2, "total_steps": 3, **story.steps[2].values}
    assert [event.level for event in told if event.level != "info"] == ["warn"]
    for state, end in (
        ("succeeded", "The job has successfully completed"),
        ("failed", "The job failed: the disk is full"),
        ("cancelled", "The job was cancelled"),
    ):
        ended = replace(running, state=state, finished=2000.0, error={"message": "the disk is full"})
        after = events_of(ended, story, 1000.0)
        assert after[: len(told)] == told
        assert after[-1].message == end
        assert after[-1].created == 2000.0


def test_nothing_is_told_of_a_run_that_is_not_there(tmp_path: Path) -> None:
    story = read_story(tmp_path / "metrics.jsonl", 0.0)
    assert [event.message for event in events_of(JOB, story, None)] == [
        "Created fine-tuning job: ftjob-1",
        "Validating training file: file-1",
    ]
