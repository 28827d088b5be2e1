"""OpenAI's own client fine-tunes on a live server, on real text, and asks what came of it; the API dies on the way."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types.fine_tuning import FineTuningJob

from families import random_state
from processes import eventually, needs_proc
from serving import serving
from smelt.configs import DecoderConfig
from smelt.data.characters import ByteTokenizer
from smelt.models.weights import write_model

pytestmark = [needs_proc, pytest.mark.slow, pytest.mark.timeout(600)]

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "openai_fine_tuning.py"
# With an end of the text, which answers learn to give.
CONFIG = DecoderConfig(vocab_size=257, block_size=256, n_layer=2, n_head=2, n_embd=64)
NUM_CHATS, NUM_HELD = 100, 20
OVER = ("succeeded", "failed", "cancelled")


def dialogues(text: str) -> list[dict[str, Any]]:
    """Of a play, each speech as the answer to the one before it."""
    speeches = [speech for speech in re.findall(r"^[A-Z][\w ]+:\n((?:.+\n)+)", text, re.MULTILINE) if len(speech) < 100]
    return [
        {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]}
        for asked, said in zip(speeches, speeches[1:], strict=False)
    ]


def jsonl(lines: list[Any]) -> bytes:
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def persistently(ask: Callable[[], FineTuningJob]) -> FineTuningJob | None:
    """What is answered, unless the API is on its way back."""
    try:
        return ask()
    except (openai.APIConnectionError, openai.InternalServerError):
        return None


def at_end(client: openai.OpenAI, job: FineTuningJob) -> FineTuningJob:
    def look() -> FineTuningJob | None:
        now = persistently(lambda: client.fine_tuning.jobs.retrieve(job.id))
        return now if now is not None and now.status in OVER else None

    found = eventually(look, "the end of the job", 240)
    assert found is not None
    return found


def num_steps(client: openai.OpenAI, job: FineTuningJob) -> int:
    events = client.fine_tuning.jobs.list_events(job.id, limit=100).data
    return sum(event.type == "metrics" for event in events)


def pause_and_resume(client: openai.OpenAI, job: FineTuningJob) -> None:
    """In the middle of its run."""
    eventually(lambda: num_steps(client, job) > 1, "the first steps", 120)
    assert client.fine_tuning.jobs.pause(job.id).status == "paused"
    before = num_steps(client, job)
    assert client.fine_tuning.jobs.resume(job.id).status in ("queued", "running")
    eventually(lambda: num_steps(client, job) > before + 2, "more steps", 120)


def test_the_whole_flow_on_real_text(tmp_path: Path, shared_data: Path) -> None:
    home = tmp_path / "home"
    base = home / "models" / "base"
    state = random_state(CONFIG)
    for name, tensor in state.items():
        if name.endswith("norm.weight"):
            tensor += 1
    write_model(CONFIG, state, base)
    ByteTokenizer().save(base)
    chats = dialogues((shared_data / "tinyshakespeare.txt").read_text()[:200_000])
    assert len(chats) > NUM_CHATS + NUM_HELD
    with serving(home) as server, openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=8) as client:
        train = client.files.create(file=("play.jsonl", jsonl(chats[:NUM_CHATS])), purpose="fine-tune")
        held = client.files.create(file=("held.jsonl", jsonl(chats[-NUM_HELD:])), purpose="fine-tune")
        # All weights first, for a model that knows nothing has nothing that an adapter could use.
        job = client.fine_tuning.jobs.create(
            model="base",
            training_file=train.id,
            validation_file=held.id,
            suffix="play",
            seed=1,
            hyperparameters={"n_epochs": 4, "batch_size": 8},
            extra_body={"config": {"lora": False, "learning_rate": 3e-3}},
        )
        pause_and_resume(client, job)
        os.kill(server.pid_of("api"), signal.SIGKILL)
        played = at_end(client, job)
        assert played.status == "succeeded", played.error
        losses = [
            checkpoint.metrics.valid_loss for checkpoint in client.fine_tuning.jobs.checkpoints.list(job.id, limit=10)
        ]
        table = client.files.content(played.result_files[0]).text.splitlines()
        columns = table[0].split(",")
        valid = [float(row.split(",")[columns.index("valid_loss")]) for row in table[1:] if row.split(",")[3]]
        assert valid[-1] < valid[0] - 0.1
        assert losses
        assert [int(row.split(",")[0]) for row in table[1:]] == list(range(1, len(table)))
        model = played.fine_tuned_model
        assert model is not None
        written = client.completions.create(
            model=model, prompt="First Citizen:", max_tokens=20, seed=1, extra_body={"ignore_eos": True}
        )
        assert written.usage is not None
        assert written.usage.completion_tokens == 20
        # What came of it learns by heart, as an adapter, as the example does.
        done = subprocess.run(
            [sys.executable, EXAMPLE, model, f"{server.url}/v1"],
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert "The job has successfully completed" in done.stdout
        assert done.stdout.splitlines()[-4:] == [
            "What is the capital of France? Paris.",
            "What is the capital of Japan? Tokyo.",
            "What is the capital of Kenya? Nairobi.",
            "What is the capital of Peru? Lima.",
        ]
        names = [card.id for card in client.models.list()]
        assert [name for name in names if name.endswith(tuple("0123456789abcdef")) and ":example:" in name]
        bad = client.files.create(file=("bad.jsonl", jsonl(chats[:3]) + b"{oops\n"), purpose="fine-tune")
        failed = at_end(client, client.fine_tuning.jobs.create(model="base", training_file=bad.id))
        assert failed.error is not None
        assert (failed.error.code, failed.error.param) == ("invalid_training_file", "training_file")
        assert "line 4" in failed.error.message
