"""The memory that training is predicted to take: what it grows with, settings that fit, and a process's real peak."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from smelt.configs import DecoderConfig
from smelt.models.training_footprint import Workload, fitting, training_footprint

SHAPE = DecoderConfig(vocab_size=257, block_size=256, n_layer=4, n_head=4, n_embd=256)
WORK = Workload(SHAPE, "float32", batch_size=16, block_size=256)


def test_parameters_are_counted_to_the_byte() -> None:
    found = training_footprint(WORK)
    num = SHAPE.num_parameters
    assert (found.weights, found.gradients, found.moments, found.checkpoint) == (4 * num, 4 * num, 8 * num, 12 * num)
    rounded = training_footprint(replace(WORK, dtype="bfloat16"))
    assert (rounded.weights, rounded.gradients) == (6 * num, 4 * num)
    adapter = training_footprint(replace(WORK, dtype="bfloat16", num_trained=1000))
    assert (adapter.weights, adapter.moments) == (2 * (num - 1000) + 6 * 1000, 8000)
    assert training_footprint(replace(WORK, on_cpu=False)).checkpoint == 0


def test_activations_grow_with_tokens_and_shrink_when_they_are_recomputed() -> None:
    activations = training_footprint(WORK).activations
    assert training_footprint(replace(WORK, batch_size=32)).activations == 2 * activations
    recomputed = training_footprint(replace(WORK, gradient_checkpointing=True)).activations
    assert recomputed < activations / 2
    deeper = SHAPE.replace(n_layer=8)
    assert training_footprint(replace(WORK, shape=deeper)).activations > 1.8 * activations


def test_settings_that_fit_keep_the_steps_as_they_are() -> None:
    whole = training_footprint(WORK).total
    assert fitting(WORK, whole) == WORK
    half = fitting(WORK, whole - 1)
    assert half == replace(WORK, batch_size=8, gradient_accumulation_steps=2)
    least = training_footprint(replace(WORK, batch_size=1, gradient_checkpointing=True)).total
    assert fitting(WORK, least) == replace(
        WORK, batch_size=1, gradient_accumulation_steps=16, gradient_checkpointing=True
    )
    assert fitting(WORK, least - 1) is None
    odd = fitting(replace(WORK, batch_size=15), least)
    assert odd is not None
    assert odd.batch_size * odd.gradient_accumulation_steps == 15


def test_parts_are_counted_to_the_byte() -> None:
    num = SHAPE.num_parameters
    alone, shared = training_footprint(WORK), training_footprint(replace(WORK, num_ranks=4))
    assert (shared.weights, shared.gradients, shared.moments) == (alone.weights, alone.gradients, alone.moments)
    assert (shared.activations, shared.checkpoint) == (alone.activations // 4, alone.checkpoint // 4)
    full = training_footprint(replace(WORK, num_ranks=4, sharding="full"))
    assert (full.moments, full.checkpoint, full.activations) == (2 * num, 3 * num, shared.activations)
    on_gpus = replace(WORK, num_ranks=4, sharding="full", on_cpu=False, dtype="bfloat16")
    block = (SHAPE.replace(n_layer=8).num_parameters - num) // 4
    outside = num - 4 * block
    found = training_footprint(on_gpus)
    assert (found.weights, found.gradients) == (num + 2 * (outside + 2 * block), num + 6 * (outside + block))
    whole = training_footprint(replace(on_gpus, sharding="optimizer"))
    assert (whole.weights, whole.gradients) == (num + 2 * num, found.gradients)
    waiting = replace(on_gpus, sharding="optimizer", gradient_accumulation_steps=8)
    assert training_footprint(waiting).gradients == num + 4 * num
    assert training_footprint(replace(WORK, sharding="full")) == alone, "one rank holds everything"
    adapter = training_footprint(replace(on_gpus, num_trained=1000))
    assert (adapter.moments, adapter.gradients) == (2000, 1000 + 6000)
    assert adapter.weights == (2 * (num - 1000) + 4000) // 4 + 2 * (outside + 2 * block)


def test_ranks_hold_parts_where_nothing_else_fits() -> None:
    deep = replace(WORK, shape=SHAPE.replace(n_layer=32, n_embd=1024), num_ranks=4)
    least = training_footprint(replace(deep, batch_size=1, gradient_checkpointing=True)).total
    found = fitting(deep, least - 1)
    assert found is not None
    assert found.sharding == "optimizer"
    assert found.batch_size * found.gradient_accumulation_steps == 16
    assert fitting(deep, least).sharding == "none"  # type: ignore[union-attr]
    assert fitting(replace(deep, num_ranks=1), least - 1) is None
    two = replace(deep, num_ranks=2, batch_size=1, gradient_accumulation_steps=16, gradient_checkpointing=True)
    found = fitting(two, training_footprint(two).total - 1)
    assert found is not None
    assert found.sharding == "full", "of two in fp32 whole gradients and gathered weights take what the parts save"
    in_parts = replace(deep, sharding="full")
    assert fitting(in_parts, training_footprint(in_parts).total) == in_parts


TRAINS = """
import json, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from smelt.run_configs import TrainConfig
from smelt.training.pretraining import pretrain
folder = Path(sys.argv[1])
pretrain(TrainConfig(**json.loads(sys.argv[2]), out_dir=str(folder / "out")), folder / "data", folder / "models")
lines = Path("/proc/self/status").read_text().splitlines()
print(1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1]))
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_process_takes_what_was_predicted(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("Some text that is read over and over again.\n" * 1000)
    config = {
        "data_path": str(tmp_path / "text.txt"),
        "tokenizer": "bytes",
        "n_layer": 4,
        "n_head": 4,
        "n_embd": 256,
        "block_size": 256,
        "batch_size": 16,
        "max_iters": 2,
        "eval_interval": 1,
        "eval_iters": 1,
        "device": "cpu",
        "dtype": "float32",
        "compile": "false",
        "threads": 1,
    }
    command = [sys.executable, "-c", TRAINS, str(tmp_path), json.dumps(config)]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    assert 0.7 < int(ended.stdout.split()[-1]) / training_footprint(WORK).total < 1.4
