"""Checkpoints are whole or absent, survive a full disk and damage, and restore to the same bits."""

import errno
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from smelt.errors import CheckpointError, NotFound, OutOfSpace, UnsupportedModel
from smelt.models.decoder import Decoder
from smelt.training import checkpoint as checkpoint_module
from smelt.training.checkpoint import Checkpoints, TrainState, check_manifest, latest, read_state, restore
from smelt.training.optim import Optimizer
from smelt.training.pretraining import model_files
from smelt.training.step import step
from tests.training.test_step_and_optim import LOSS, SHAPE, make_batch, make_model

STATE = TrainState(
    step=0,
    num_updates=0,
    best_val_loss=None,
    dataset="toy",
    dataset_sha256="0" * 64,
    compiled=False,
    dtype="float32",
    threads=1,
    world_size=1,
    torch_version=torch.__version__,
)


FILES = model_files(SHAPE, None)


def trained(num_steps: int, dtype: torch.dtype = torch.float32) -> tuple[Decoder, Optimizer]:
    model = make_model()
    optimizer = Optimizer(model, dtype, (0.9, 0.95), 0.1, 1.0)
    train(model, optimizer, range(num_steps))
    return model, optimizer


def train(model: Decoder, optimizer: Optimizer, numbers: range) -> None:
    for number in numbers:
        step(model, make_batch(number), LOSS, 1 / 64)
        optimizer.step(1e-2)


def save(out_dir: Path, optimizer: Optimizer, at_step: int, is_best: bool = False, keep: int = 2) -> Path:
    checkpoints = Checkpoints(out_dir, keep, FILES)
    checkpoints.save(optimizer, replace(STATE, step=at_step, num_updates=optimizer.num_steps), is_best)
    checkpoints.wait()
    return (out_dir / "last").resolve()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_restored_run_goes_on_to_the_same_bits(tmp_path: Path, dtype: torch.dtype) -> None:
    model, optimizer = trained(3, dtype)
    folder = save(tmp_path, optimizer, 3)
    train(model, optimizer, range(3, 6))

    other = Decoder(SHAPE)
    other_optimizer = Optimizer(other, dtype, (0.9, 0.95), 0.1, 1.0)
    state = restore(folder, FILES, other_optimizer)
    assert (state.step, other_optimizer.num_steps) == (3, 3)
    train(other, other_optimizer, range(3, 6))
    for name, tensor in optimizer.buffers().items():
        assert torch.equal(tensor, other_optimizer.buffers()[name]), name


def test_without_the_optimizers_moments_the_bits_differ(tmp_path: Path) -> None:
    """The probe that the test above can fail: a weights-only restore is not a resume."""
    model, optimizer = trained(3)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model, optimizer, range(3, 6))
    other = make_model()
    other.load_state_dict(weights)
    other_optimizer = Optimizer(other, torch.float32, (0.9, 0.95), 0.1, 1.0)
    train(other, other_optimizer, range(3, 6))
    assert not torch.equal(optimizer.buffers()["0.masters"], other_optimizer.buffers()["0.masters"])


def test_training_may_go_on_while_the_files_are_written(tmp_path: Path) -> None:
    model, optimizer = trained(2)
    at_save = {name: tensor.clone() for name, tensor in optimizer.named(optimizer.buffers(), "masters").items()}
    checkpoints = Checkpoints(tmp_path, 2, FILES)
    checkpoints.save(optimizer, replace(STATE, step=2, num_updates=2), is_best=False)
    step(model, make_batch(2), LOSS, 1 / 64)  # reads the weights while they are copied
    checkpoints.wait_until_copied()
    optimizer.step(1e-2)
    train(model, optimizer, range(3, 6))
    checkpoints.wait()
    other = Decoder(SHAPE)
    restore(latest(tmp_path), FILES, Optimizer(other, torch.float32, (0.9, 0.95), 0.1, 1.0))
    for name, parameter in other.named_parameters():
        assert torch.equal(parameter.detach(), at_save[name]), name


def test_the_writer_rests_beside_training_until_somebody_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_module, "WRITER_SHARE", 1e-9)
    model, optimizer = trained(1)
    checkpoints = Checkpoints(tmp_path, 2, FILES)
    checkpoints.begun_at -= 1e6  # saves are far apart
    checkpoints.save(optimizer, replace(STATE, step=1, num_updates=1), is_best=False)
    checkpoints.wait_until_copied()  # the copy does not rest: the next update stands behind it
    with pytest.raises(NotFound):
        latest(tmp_path)
    assert checkpoints.writer is not None
    assert checkpoints.writer.is_alive()
    checkpoints.save(optimizer, replace(STATE, step=2, num_updates=1), is_best=False)  # waits for the first
    assert read_state(latest(tmp_path)).step == 1
    checkpoints.wait()
    assert read_state(latest(tmp_path)).step == 2


def test_the_writer_is_done_before_the_next_save_is_due(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_module, "WRITER_SHARE", 1e-9)
    model, optimizer = trained(1)
    checkpoints = Checkpoints(tmp_path, 2, FILES)
    checkpoints.save(optimizer, replace(STATE, step=1, num_updates=1), is_best=False)
    assert checkpoints.writer is not None
    checkpoints.writer.join(30)  # nobody hurries it
    assert read_state(latest(tmp_path)).step == 1


def test_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    model, optimizer = trained(1)
    for at_step in range(1, 6):
        save(tmp_path, optimizer, at_step, is_best=at_step == 2)
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["step-00000002", "step-00000004", "step-00000005"]
    assert (tmp_path / "best").resolve().name == "step-00000002"
    assert (tmp_path / "last").resolve().name == "step-00000005"


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(tmp_path: Path) -> None:
    model, optimizer = trained(1)
    first = save(tmp_path, optimizer, 1)
    second = save(tmp_path, optimizer, 2)
    weights = second / "model.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.write_bytes(damaged)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
        check_manifest(second)
    assert latest(tmp_path) == first
    weights.write_bytes(damaged[:-1])
    with pytest.raises(CheckpointError, match="wrong size"):
        check_manifest(second)
    (first / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        latest(tmp_path)


def test_nothing_to_resume_from_says_so(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no checkpoint to resume from"):
        latest(tmp_path)


def test_a_full_disk_is_a_clear_error_and_the_last_checkpoint_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = trained(1)
    first = save(tmp_path, optimizer, 1)

    def no_space(*_arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint_module, "write_tensors", no_space)
    with pytest.raises(OutOfSpace, match="earlier checkpoints are whole"):
        save(tmp_path, optimizer, 2)
    assert latest(tmp_path) == first
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]


def test_leftovers_of_a_kill_are_removed_and_never_read(tmp_path: Path) -> None:
    model, optimizer = trained(1)
    first = save(tmp_path, optimizer, 1)
    torn = tmp_path / "checkpoints" / ".tmp-4711"
    torn.mkdir()
    (torn / "model.safetensors").write_bytes(b"half")
    assert latest(tmp_path) == first
    Checkpoints(tmp_path, 2, FILES)
    assert not torn.exists()


def test_a_checkpoint_of_another_shape_names_the_tensor(tmp_path: Path) -> None:
    model, optimizer = trained(1)
    folder = save(tmp_path, optimizer, 1)
    wider = Decoder(SHAPE.replace(vocab_size=40))
    with pytest.raises(
        UnsupportedModel, match=r"wte\.weight has shape \(31, 16\), but config\.json asks for \(40, 16\)"
    ):
        restore(folder, model_files(wider.config, None), Optimizer(wider, torch.float32, (0.9, 0.95), 0.1, 1.0))


def test_the_files_are_plain_and_listed_in_the_manifest(tmp_path: Path) -> None:
    model, optimizer = trained(1)
    folder = save(tmp_path, optimizer, 1)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert set(manifest) == {path.name for path in folder.iterdir()} - {"manifest.json"}
    assert {name.rpartition(".")[2] for name in manifest} == {"json", "safetensors"}
    moments = load_file(folder / "optimizer.safetensors")
    assert len(moments) == 2 * len(list(model.parameters()))
