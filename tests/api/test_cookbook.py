"""Recipes of tinker-cookbook as they come, against `smelt serve`: no network, a tiny base, and data that we make up.

`make cookbook` installs the cookbook beside `.venv` and runs this. Its recipes know their models by the hub's names, so
the base has one, and is found below the working folder by it, tokenizer and all; so are the data sets.
"""

import json
import os
import random
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import smelt
from serving import Server, serving
from smelt.control.models import import_model

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / ".cookbook" / "bin" / "python"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(not PYTHON.exists(), reason="optional package tinker-cookbook is missing: make cookbook"),
]

BASE = "Qwen/Qwen3-8B-Base"  # a name for which the cookbook chooses a renderer that any tokenizer can follow
SEED = 0

ADDITION = "User: What is 4 + 5?\n\nAssistant: 9\n\nUser: What is {x} + {y}?\n\nAssistant: {sum}\n\nUser:"
SUFFIX = " Provide a numerical answer without units, written inside \\boxed{}."
BOXED = (
    f"User: How many r's are in strawberry?{SUFFIX}\n\nAssistant: Let's spell the word out and number all the letters: "
    "1) s 2) t 3) r 4) a 5) w 6) b 7) e 8) r 9) r 10) y. We have r's at positions 3, 8, and 9. \\boxed{3}\n\n"
)


@dataclass(frozen=True, slots=True)
class Workplace:
    """A server, and the folder in which recipes run."""

    server: Server
    folder: Path

    def run(self, recipe: str, **options: object) -> list[dict[str, Any]]:
        """The metrics that a recipe has logged, step by step."""
        log = self.folder / "logs" / recipe
        given = {"base_url": self.server.url, "log_path": log, "model_name": BASE, "lora_rank": 8, **options}
        command = [str(PYTHON), "-m", f"tinker_cookbook.recipes.{recipe}"]
        command += [f"{name}={value}" for name, value in given.items() if value is not None]
        done = subprocess.run(command, cwd=self.folder, env=environment(), capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stderr[-4000:]
        assert (log / "checkpoints.jsonl").is_file(), "the end is kept"
        return [json.loads(line) for line in (log / "metrics.jsonl").read_text().splitlines()]


def environment() -> dict[str, str]:
    """Of a user who has no network."""
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "WANDB_MODE": "disabled", "TINKER_TELEMETRY": "0"}
    return {**os.environ, **offline, "TINKER_API_KEY": "tml-test", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workplace]:
    folder = tmp_path_factory.mktemp("cookbook")
    home = folder / "home"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SMELT_HOME", str(home))
        patch.setenv("SMELT_DTYPE", "float32")
        base = make_base(folder)
        import_model(base, BASE, home / "models", origin="made up")
        work = folder / "work"
        write_data(work)
        (work / "Qwen").symlink_to(home / "models" / "Qwen")
        with serving(home) as server:
            yield Workplace(server, work)


def make_base(folder: Path) -> Path:
    """A model that knows what a sum looks like, and now and then how much it is."""
    rng = random.Random(SEED)
    texts = [ADDITION.format(x=x, y=y, sum=x + y) for x, y in pairs(rng, 400, 101)]
    texts += [
        f"{BOXED}User: {question(x, y)}{SUFFIX}\n\nAssistant: \\boxed{{{x + y}}}\n\nUser:"
        for x, y in pairs(rng, 600, 5)
    ]
    rng.shuffle(texts)
    write_lines(folder / "sums.jsonl", [{"text": text} for text in texts])
    smelt.train(
        data_path=str(folder / "sums.jsonl"), tokenizer="bytes", out_dir=str(folder / "base"), block_size=512,
        n_layer=2, n_head=4, n_embd=64, batch_size=6, max_iters=150, learning_rate=1e-2, eval_interval=150,
        eval_iters=1, device="cpu", compile="false", seed=SEED,
    )  # fmt: skip
    return folder / "base" / "last"


def pairs(rng: random.Random, num_pairs: int, below: int) -> list[tuple[int, int]]:
    return [(rng.randrange(below), rng.randrange(below)) for _ in range(num_pairs)]


def question(x: int, y: int) -> str:
    return f"What is {x} + {y}?"


def write_data(work: Path) -> None:
    """Data sets under the names that the recipes ask the hub for, and conversations of our own."""
    rng = random.Random(SEED)
    sums = pairs(rng, 128, 5)
    chats = [talk(f"Which number follows {x}?", f"{x + 1} follows {x}.") for x in range(64)]
    write_lines(work / "chats.jsonl", chats)
    for split in ("train", "test"):
        write_lines(work / "HuggingFaceH4" / "no_robots" / f"{split}.jsonl", chats)
        gsm8k = work / "openai" / "gsm8k"
        rows = [{"question": question(x, y), "answer": f"{x} + {y} = {x + y}\n#### {x + y}"} for x, y in sums]
        write_lines(gsm8k / f"{split}.jsonl", rows)
        says = "\n\nHuman: {}\n\nAssistant: {}"
        asked = [f"How are you, number {x}?" for x in range(64)]
        liked = [{"chosen": says.format(ask, "Well."), "rejected": says.format(ask, "Bad!")} for ask in asked]
        write_lines(work / "Anthropic" / "hh-rlhf" / f"{split}.jsonl", liked)
    files = [{"split": split, "path": f"{split}.jsonl"} for split in ("train", "test")]
    card = json.dumps({"configs": [{"config_name": "main", "data_files": files}]})  # JSON is YAML
    (gsm8k / "README.md").write_text(f"---\n{card}\n---\n")


def talk(ask: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": ask}, {"role": "assistant", "content": answer}]}


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def values(metrics: list[dict[str, Any]], name: str) -> list[float]:
    found = [float(step[name]) for step in metrics if name in step]
    assert found, sorted(metrics[0])
    return found


def test_sl_loop(workplace: Workplace) -> None:
    metrics = workplace.run("sl_loop", batch_size=8, learning_rate=1e-2, save_every=4, max_length=256)
    losses = values(metrics, "train_mean_nll")
    assert len(losses) == 8
    assert losses[-1] < 0.7 * losses[0]


def test_chat_sl(workplace: Workplace) -> None:
    metrics = workplace.run(
        "chat_sl.train",
        dataset="chats.jsonl",
        renderer_name="role_colon",
        batch_size=8,
        learning_rate=1e-2,
        save_every=4,
    )
    losses = values(metrics, "train_mean_nll")
    assert losses[-1] < 0.7 * losses[0]


def test_rl_loop(workplace: Workplace) -> None:
    metrics = workplace.run(
        "rl_loop", batch_size=8, group_size=8, max_tokens=16, max_steps=4, learning_rate=3e-3,
        loss_fn="importance_sampling", save_every=2,
    )  # fmt: skip
    assert len(metrics) == 4
    assert 0 < sum(values(metrics, "reward/total")) < 4
    assert max(values(metrics, "grad_norm")) > 0


def test_math_rl(workplace: Workplace) -> None:
    metrics = workplace.run(
        "math_rl.train", env="arithmetic", renderer_name="role_colon", loss_fn="importance_sampling", group_size=8,
        groups_per_batch=8, max_tokens=12, max_steps=4, learning_rate=3e-3, save_every=2, eval_every=0,
        compute_post_kl=True,
    )  # fmt: skip
    assert len(values(metrics, "env/all/reward/total")) == 4
    assert max(abs(kl) for kl in values(metrics, "optim/kl_sample_train_v1")) < 1e-3
    assert max(abs(kl) for kl in values(metrics, "optim/kl_sample_train_v2")) < 1e-3


def test_dpo(workplace: Workplace) -> None:
    metrics = workplace.run(
        "preference.dpo.train", dataset="hhh", renderer_name="role_colon", lora_rank=None, batch_size=8, max_steps=6,
        learning_rate=1e-3, max_length=256,
    )  # fmt: skip
    assert values(metrics, "dpo_loss")[-1] < values(metrics, "dpo_loss")[0]
    assert values(metrics, "margin")[-1] > 0
