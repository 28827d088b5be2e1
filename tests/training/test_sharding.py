"""Models in shards on two ranks against one process that holds everything: weights, norms, bytes and checkpoints."""

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from processes import needs_proc
from ranks import on_two_ranks
from smelt.configs import DecoderConfig
from smelt.errors import ConfigError
from smelt.models.batch import Batch
from smelt.models.decoder import Decoder
from smelt.run_configs import TrainConfig, config_of
from smelt.training.checkpoint import Checkpoints, latest, restore
from smelt.training.gradient_sum import GradientSum, ShardedSum
from smelt.training.lora_factors import LoraFactors, fresh_adapter
from smelt.training.optim import Optimizer
from smelt.training.parallel import Ranks, join, read_ranks
from smelt.training.pretraining import model_files
from smelt.training.run_setup import optimizer_of
from smelt.training.step import step
from tests.training.test_checkpoint import STATE
from tests.training.test_step_and_optim import LOSS, make_batch

pytestmark = pytest.mark.slow

# Odd sizes, so that the ranks' parts differ; no key biases, whose gradient is nothing but rounding.
SHAPE = DecoderConfig(vocab_size=31, block_size=16, n_layer=3, n_head=3, n_embd=33, qkv_bias=False)
FILES = model_files(SHAPE, None)
CPU = torch.device("cpu")
NUM_ROWS = 8


class Training:
    """A model, and whoever trains it: one process, or one of two ranks that share the rows."""

    def __init__(self, dtype: torch.dtype, ranks: Ranks, shape: DecoderConfig = SHAPE, **more: Any) -> None:
        torch.set_num_threads(1)
        self.model, self.ranks = Decoder(shape), ranks
        self.model.initialize(0)
        if more.pop("lora", False):
            LoraFactors(self.model.to(dtype), fresh_adapter(shape, rank=4, alpha=8.0, targets="all", seed=3))
        self.model.gradient_checkpointing = bool(more.pop("gradient_checkpointing", False))
        config = TrainConfig(weight_decay=0.3, grad_clip=0.5)
        self.optimizer: Optimizer = optimizer_of(config, self.model, dtype, CPU, ranks)
        self.sum = ShardedSum(self.model, ranks) if ranks.in_step else GradientSum(self.model, self.optimizer, ranks)
        self.norms: list[float | None] = []

    def take_steps(self, numbers: range) -> None:
        """With 1 and 4 passes in turns, of as many rows whoever computes them, so that bf16 rounds the same."""
        for number in numbers:
            rows = make_batch(number, NUM_ROWS)
            num_passes = 4 if number % 2 else 1
            micro = NUM_ROWS // 2 // num_passes
            own = self.ranks.rows(NUM_ROWS)
            firsts = range(own.start, own.stop, micro)
            for first in firsts:
                if first == firsts[-1]:
                    self.sum.begin()
                part = Batch(rows.tokens[first : first + micro], rows.targets[first : first + micro])
                step(self.model, part, LOSS, 1 / rows.num_targets)
            self.sum.finish()
            self.norms.append(self.optimizer.step(1e-2))

    def weights(self) -> dict[str, Any]:
        masters = self.optimizer.named(self.optimizer.buffers(), "masters")
        return {name: self.optimizer.whole(tensor).detach().numpy().copy() for name, tensor in masters.items()}


def train(dtype: torch.dtype, sharding: str, more: dict[str, Any]) -> dict[str, Any]:
    ranks = read_ranks(sharding=sharding)
    with join(ranks, CPU):
        training = Training(dtype, ranks, **more)
        training.take_steps(range(6))
        return {"norms": training.norms, "weights": training.weights()}


@pytest.mark.parametrize("sharding", ["full", "optimizer"])
@pytest.mark.parametrize(
    ("dtype", "tolerance", "more"),
    [
        (torch.float32, 1e-5, {}),
        (torch.bfloat16, 1e-3, {"gradient_checkpointing": True}),
        (torch.float32, 1e-4, {"lora": True, "gradient_checkpointing": True}),
        (torch.bfloat16, 1e-3, {"lora": True}),
    ],
)
def test_two_ranks_learn_what_one_process_does(
    tmp_path: Path, sharding: str, dtype: torch.dtype, tolerance: float, more: dict[str, Any]
) -> None:
    alone = Training(dtype, Ranks(), **more)
    alone.take_steps(range(6))
    before = Training(dtype, Ranks(), **more).weights()
    expected = alone.weights()
    for found in on_two_ranks(tmp_path, train, dtype, sharding, more):
        assert isinstance(found, dict)
        assert found["norms"] == pytest.approx(alone.norms, rel=10 * tolerance)
        assert min(found["norms"]) > 0.5, "each step was clipped"
        assert found["weights"].keys() == expected.keys()
        for name, weight in found["weights"].items():
            torch.testing.assert_close(
                torch.from_numpy(weight), torch.from_numpy(expected[name]), atol=tolerance, rtol=tolerance
            )
    assert max(abs(expected[name] - before[name]).max() for name in expected) > 10 * tolerance


def held_bytes() -> int:
    """Of all plain tensors in this process, each memory once. DTensors hold such; those of compilers hold nothing."""
    gc.collect()
    found = [each for each in gc.get_objects() if type(each) in (torch.Tensor, torch.nn.Parameter)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in found}
    return sum(storages.values())


def count_bytes(sharding: str) -> dict[str, int]:
    ranks = read_ranks(sharding=sharding)
    with join(ranks, CPU):
        before = held_bytes()
        training = Training(torch.float32, ranks)
        training.take_steps(range(2))
        held = held_bytes() - before
        parts = [*training.optimizer.buffers().values(), *training.optimizer.gradients()]
        own = [part.to_local() if isinstance(part, DTensor) else part for part in parts]
        return {"held": held, "counted": sum(4 * part.numel() for part in own)}


def test_each_rank_holds_its_part_of_the_bytes(tmp_path: Path) -> None:
    before = held_bytes()
    alone = Training(torch.float32, Ranks())
    alone.take_steps(range(2))
    whole = held_bytes() - before
    num_bytes = 16 * SHAPE.num_parameters  # weights, gradients and two moments
    assert num_bytes <= whole < 1.1 * num_bytes
    counts = on_two_ranks(tmp_path, count_bytes, "full")
    assert sum(count["counted"] for count in counts) == num_bytes  # type: ignore[index]
    for count in counts:
        assert isinstance(count, dict)
        assert 0.45 * num_bytes < count["counted"] < 0.55 * num_bytes
        assert count["held"] < 0.6 * num_bytes, "and nothing else is kept between steps"


def peak_bytes(shape: DecoderConfig) -> int:
    """What a rank took at the worst moment of two steps, beyond Python and torch."""
    ranks = read_ranks(sharding="full")
    with join(ranks, CPU):
        before = memory_of_process("VmRSS")
        Training(torch.float32, ranks, shape).take_steps(range(2))
        return memory_of_process("VmHWM") - before


def memory_of_process(kind: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{kind}:")).split()[1])


@needs_proc
def test_memory_that_parts_do_not_need_goes_back_to_the_system(tmp_path: Path) -> None:
    """Whole weights, gradients and moments take 16 bytes each; glibc would have kept more than these."""
    shape = DecoderConfig(vocab_size=31, block_size=16, n_layer=8, n_head=8, n_embd=768)
    for found in on_two_ranks(tmp_path, peak_bytes, shape):
        assert isinstance(found, int)
        assert 8 * shape.num_parameters < found < 0.9 * 16 * shape.num_parameters


def go_on(folder: Path, sharding: str, dtype: torch.dtype) -> None:
    ranks = read_ranks(sharding=sharding)
    with join(ranks, CPU):
        training = Training(dtype, ranks)
        training.model.logits(training.model(make_batch(0)))  # weights are gathered that are not the checkpoint's
        state = restore(latest(folder / "alone"), FILES, training.optimizer)
        training.take_steps(range(state.step, 6))
        save(folder / "two", training, 6)


def save(out_dir: Path, training: Training, at_step: int) -> None:
    checkpoints = Checkpoints(out_dir, 2, FILES)
    if training.optimizer.is_sharded:
        checkpoints.gather(training.optimizer, keep=training.ranks.is_main)
    if training.ranks.is_main:
        num_updates = training.optimizer.num_steps
        checkpoints.save(training.optimizer, replace(STATE, step=at_step, num_updates=num_updates), is_best=False)
        checkpoints.wait()
    assert training.ranks.is_main or not checkpoints.warm, "rank 0 alone keeps whole tensors"


@pytest.mark.parametrize("sharding", ["full", "optimizer"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-3)])
def test_a_run_goes_on_with_and_without_shards(
    tmp_path: Path, sharding: str, dtype: torch.dtype, tolerance: float
) -> None:
    """3 steps in one process, 3 on two sharded ranks, 3 in one process: as 9 in one."""
    begun = Training(dtype, Ranks())
    begun.take_steps(range(3))
    save(tmp_path / "alone", begun, 3)
    on_two_ranks(tmp_path, go_on, tmp_path, sharding, dtype)
    ended = Training(dtype, Ranks())
    state = restore(latest(tmp_path / "two"), FILES, ended.optimizer)
    assert (state.step, ended.optimizer.num_steps) == (6, 6)
    ended.take_steps(range(6, 9))
    begun.take_steps(range(3, 9))
    for name, weight in begun.weights().items():
        found = ended.weights()[name]
        torch.testing.assert_close(torch.from_numpy(found), torch.from_numpy(weight), atol=tolerance, rtol=tolerance)
    for ours, theirs in zip(ended.norms, begun.norms[6:], strict=True):
        assert ours == pytest.approx(theirs, rel=10 * tolerance)


def overflow(sharding: str) -> list[object]:
    ranks = read_ranks(sharding=sharding)
    with join(ranks, CPU):
        training = Training(torch.float16, ranks)
        before = training.weights()
        if not ranks.is_main:
            training.optimizer.gradients()[0].fill_(float("inf"))
        norm = training.optimizer.step(1e-2)
        same = all((training.weights()[name] == before[name]).all() for name in before)
        assert training.optimizer.loss_scale is not None
        return [norm, same, training.optimizer.loss_scale.value, training.optimizer.num_steps]


def test_an_overflow_of_one_rank_is_one_of_all(tmp_path: Path) -> None:
    assert on_two_ranks(tmp_path, overflow, "full") == [[None, True, 32768.0, 0]] * 2


def test_shards_are_not_compiled() -> None:
    with pytest.raises(ConfigError, match="sharding full cannot be compiled: give compile=false"):
        config_of({"sharding": "full", "compile": "true"})
    assert config_of({"sharding": "optimizer"}).sharding == "optimizer"
