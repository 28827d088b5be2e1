"""Sessions that train all weights of a model: gradients, steps, checkpoints and states, and whom they leave alone."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from session_training import STEP, check_a_checkpoint_continues, train
from smelt.errors import CheckpointError, InvalidInput, TrainingError
from smelt.models.batch import Batch
from smelt.models.decoder import Decoder
from smelt.models.weights import read_model
from smelt.training import trained_model
from smelt.training.losses import LOSSES
from smelt.training.session import Outcome, SessionTrainer, Work
from smelt.training.trained_model import TrainedModel
from smelt.training.trained_weights import OptimSettings
from smelt.types import Datum
from training_data import datum_of, make_model, rl_datum


def done(outcome: Outcome | Exception) -> Outcome:
    assert isinstance(outcome, Outcome), outcome
    return outcome


def gradients_of(model: Decoder, data: list[Datum], loss: str) -> dict[str, Tensor]:
    """By autograd, datum by datum, with the logits of all tokens at once."""
    copy = Decoder(model.config).to(model.embedding.weight.dtype)
    copy.load_state_dict(model.state_dict())
    for datum in data:
        targets = torch.from_numpy(datum.inputs["target_tokens"])
        logits = copy.logits(copy(Batch(torch.from_numpy(datum.tokens.astype(np.int64))[None])))[0].float()
        logprobs = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
        inputs = {name: torch.from_numpy(value) for name, value in datum.inputs.items() if name != "target_tokens"}
        LOSSES[loss](logprobs, inputs)[0].backward()
    return {name: parameter.grad for name, parameter in copy.named_parameters() if parameter.grad is not None}


def views(trained: TrainedModel, buffer: Tensor) -> dict[str, Tensor]:
    return trained._group.views(buffer)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("loss", ["cross_entropy", "ppo"])
def test_gradients_are_those_of_autograd(tied: bool, loss: str) -> None:
    trainer = SessionTrainer(make_model(tied=tied))
    trained = trainer.create_whole()
    data = [rl_datum(5, 1), rl_datum(70, 2)]
    outcome = done(trainer.forward_backward([Work(trained, data, loss)])[0])
    expected = gradients_of(trainer.model, data, loss)
    found = views(trained, trained.gradients)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=2e-4)
    assert [len(each) for each in outcome.logprobs] == [5, 70]


def test_long_data_have_the_same_gradient_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = SessionTrainer(make_model())
    whole, pieces = trainer.create_whole(), trainer.create_whole()
    first = done(trainer.forward_backward([Work(whole, [datum_of(70)], "cross_entropy")])[0])
    monkeypatch.setattr(trained_model, "HEAD_ROWS", 16)
    second = done(trainer.forward_backward([Work(pieces, [datum_of(70)], "cross_entropy")])[0])
    np.testing.assert_allclose(first.logprobs[0], second.logprobs[0], atol=1e-5)
    torch.testing.assert_close(whole.gradients, pieces.gradients, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_company_and_cuts_change_no_bit(dtype: torch.dtype) -> None:
    trainer = SessionTrainer(make_model(dtype))
    data = [rl_datum(30, 1), rl_datum(64, 2), rl_datum(7, 3)]
    alone, accompanied = trainer.create_whole(), trainer.create_whole()
    [outcome] = trainer.forward_backward([Work(alone, data, "ppo")])
    adapter = trainer.create(rank=4, seed=1)
    mate = Work(adapter, [rl_datum(40, 4)], "cross_entropy")
    other = Work(trainer.create_whole(), [rl_datum(12, 5)], "cross_entropy")
    parts = [Work(accompanied, [datum], "ppo") for datum in data]
    outcomes = trainer.forward_backward([mate, parts[0], parts[1], other])
    outcomes += trainer.forward_backward([parts[2]])
    assert torch.equal(alone.gradients, accompanied.gradients)
    found = [done(outcomes[index]).logprobs[0] for index in (1, 2, 4)]
    assert [each.tobytes() for each in found] == [each.tobytes() for each in done(outcome).logprobs]
    lone = trainer.create(rank=4, seed=1)
    trainer.forward_backward([Work(lone, list(mate.data), "cross_entropy")])
    assert torch.equal(lone.gradients, adapter.gradients)


def test_the_model_it_began_with_stays_as_it_was() -> None:
    model = make_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer = SessionTrainer(model)
    trained = trainer.create_whole()
    trainer.forward_backward([Work(trained, [datum_of(20)], "cross_entropy")])
    trainer.optim_step(trained, STEP)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not torch.equal(trained.model.embedding.weight, model.embedding.weight)


def test_a_step_is_that_of_adamw_on_all_weights() -> None:
    trainer = SessionTrainer(make_model())
    trained = trainer.create_whole()
    weights = trained.masters.clone().requires_grad_()
    settings = OptimSettings(learning_rate=0.01, beta1=0.8, beta2=0.9, eps=1e-8, weight_decay=0.1, grad_clip_norm=0.5)
    theirs = torch.optim.AdamW([weights], lr=0.01, betas=(0.8, 0.9), eps=1e-8, weight_decay=0.1)
    for number in range(3):
        trainer.forward_backward([Work(trained, [datum_of(20, number)], "cross_entropy")])
        weights.grad = trained.gradients.clone()
        torch.nn.utils.clip_grad_norm_([weights], 0.5)
        theirs.step()
        trainer.optim_step(trained, settings)
        torch.testing.assert_close(trained.masters, weights.detach(), rtol=1e-5, atol=1e-6)


def test_masters_learn_what_bfloat16_cannot_hold() -> None:
    trainer = SessionTrainer(make_model(torch.bfloat16))
    trained = trainer.create_whole()
    before = trained.masters.clone()
    for _ in range(2):
        trainer.forward_backward([Work(trained, [datum_of(20)], "cross_entropy")])
        trainer.optim_step(trained, OptimSettings(learning_rate=1e-6))
    assert bool((trained.masters != before).any())
    embedding = views(trained, trained.masters)["embedding.weight"]
    assert torch.equal(trained.model.embedding.weight, embedding.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_continues_as_if_nothing_had_been(dtype: torch.dtype, tmp_path: Path) -> None:
    trainer = SessionTrainer(make_model(dtype))
    check_a_checkpoint_continues(trainer, trainer.create_whole(), trainer.create_whole, tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_state_holds_the_gradient_that_waits(dtype: torch.dtype, tmp_path: Path) -> None:
    trainer = SessionTrainer(make_model(dtype))
    trained, again = trainer.create_whole(), trainer.create_whole()
    train(trainer, trained, range(2))
    trainer.forward_backward([Work(trained, [datum_of(20, 7)], "cross_entropy")])
    state = trained.state()
    trainer.optim_step(trained, STEP)
    state.write(tmp_path / "s")
    again.read_state(tmp_path / "s")
    trainer.optim_step(again, STEP)
    assert torch.equal(again.masters, trained.masters)
    assert torch.equal(again.model.embedding.weight, trained.model.embedding.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_saved_is_a_model_and_can_be_trained_on(dtype: torch.dtype, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    trainer = SessionTrainer(make_model(dtype, n_layer=1))
    trained = trainer.create_whole()
    train(trainer, trained, range(2))
    trained.save_weights(tmp_path / "m")
    tokens = torch.from_numpy(datum_of(20).tokens.astype(np.int64))[None]
    ours, saved = trained.model.eval(), read_model(tmp_path / "m")
    with torch.no_grad():
        logits = ours.logits(ours(Batch(tokens)))
        assert torch.equal(saved.logits(saved(Batch(tokens))), logits)
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)(tokens).logits
    torch.testing.assert_close(logits.float(), theirs, atol=1e-4 if dtype == torch.float32 else 0.2, rtol=0)
    again = trainer.create_whole()
    again.load(tmp_path / "m", with_optimizer=False)
    assert torch.equal(again.model.embedding.weight, trained.model.embedding.weight)


def test_what_fails_takes_no_other_with_it() -> None:
    trainer = SessionTrainer(make_model())
    trained, adapter = trainer.create_whole(), trainer.create(rank=2, seed=0)
    endless = datum_of(4, weights=np.array([0, np.inf, 0, 0], np.float32))
    works = [Work(trained, [endless], "cross_entropy"), Work(adapter, [datum_of(9)], "cross_entropy")]
    outcomes = trainer.forward_backward(works)
    assert isinstance(outcomes[0], Exception)
    done(outcomes[1])
    with pytest.raises(TrainingError, match="has failed"):
        trainer.optim_step(trained, STEP)
    trainer.optim_step(adapter, STEP)
    train(trainer, trained, range(1))  # a new window


def test_forward_alone_leaves_no_gradient() -> None:
    trainer = SessionTrainer(make_model())
    trained = trainer.create_whole()
    works = [Work(trained, [datum_of(40)], "cross_entropy", forward_only=only) for only in (True, False)]
    forward = done(trainer.forward_backward(works[:1])[0])
    assert not trained.gradients.any()
    both = done(trainer.forward_backward(works[1:])[0])
    np.testing.assert_allclose(forward.logprobs[0], both.logprobs[0], atol=1e-5)


def test_where_memory_is_short_it_says_how_much_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = SessionTrainer(make_model())
    monkeypatch.setattr(trained_model, "free_memory", lambda _device: 2**20)
    with pytest.raises(InvalidInput, match=r"to train all [\d,]+ weights takes 2 MiB of memory, and 1 MiB are free"):
        trainer.create_whole()


def test_another_model_s_checkpoint_is_refused(tmp_path: Path) -> None:
    small, large = SessionTrainer(make_model()), SessionTrainer(make_model(n_layer=1))
    small.create_whole().save(tmp_path / "c")
    with pytest.raises(CheckpointError, match="is not the model that this session trains"):
        large.create_whole().load(tmp_path / "c", with_optimizer=True)
