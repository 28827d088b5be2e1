import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from families import FAMILIES, make_reference
from kernels_built import built_kernels
from smelt.data.chat_training import preference_datum
from smelt.errors import InvalidInput, NonFiniteLoss, TrainingError
from smelt.inference.engine import Engine
from smelt.inference.sequence import Sequence
from smelt.models import kernels
from smelt.models.adapter_folders import UNEMBEDDING
from smelt.models.batch import Batch
from smelt.models.decoder import Decoder
from smelt.models.quantization import quantize
from smelt.models.weights import read_model
from smelt.training import target_logprobs
from smelt.training.losses import LOSSES, REFERRING
from smelt.training.session import Outcome, SessionTrainer, Work
from smelt.training.trained_adapter import TrainedAdapter
from smelt.training.trained_weights import OptimSettings
from smelt.types import Datum, SamplingParams
from training_data import VOCAB, datum_of, make_model, rl_datum

pytestmark = pytest.mark.usefixtures("computed_by")


def adapter_of(trainer: SessionTrainer, seed: int = 0, rank: int = 4, **flags: bool) -> TrainedAdapter:
    """One that changes something: B is no longer zero."""
    adapter = trainer.create(rank=rank, seed=seed, **flags)
    generator = torch.Generator().manual_seed(100 + seed)
    for pairs in adapter.factors.values():
        for _, b in pairs:
            b.copy_(torch.randn(b.shape, generator=generator) * 0.02)
    return adapter


def two_targets(num_tokens: int) -> Datum:
    targets = np.random.default_rng(7).integers(0, VOCAB, (num_tokens, 2))
    return datum_of(num_tokens, target_tokens=targets, weights=np.full((num_tokens, 2), 0.5, np.float32))


def done(outcome: Outcome | Exception) -> Outcome:
    assert isinstance(outcome, Outcome), outcome
    return outcome


def reference(
    model: Decoder, adapter: TrainedAdapter, data: list[Datum], loss: str
) -> tuple[list[Tensor], float, dict[str, list[tuple[Tensor, Tensor]]]]:
    """Log-probabilities, the loss and the factors' gradients, by autograd through W + scale B A, datum by datum."""
    leaves = {
        name: [(a.clone().requires_grad_(), b.clone().requires_grad_()) for a, b in pairs]
        for name, pairs in adapter.factors.items()
    }
    state = dict(model.named_parameters())
    state[f"{UNEMBEDDING}.weight"] = model.embedding.weight if model.head is None else state["head.weight"]
    changed = {
        f"{name}.weight": state[f"{name}.weight"] + adapter.scale * torch.cat([b @ a for a, b in pairs])
        for name, pairs in leaves.items()
    }
    head = changed.pop(f"{UNEMBEDDING}.weight", state[f"{UNEMBEDDING}.weight"])
    total, logprobs = torch.zeros(()), []
    for datum in data:
        batch = Batch(torch.from_numpy(datum.tokens.astype(np.int64))[None])
        hidden = functional_call(model, changed, (batch,))
        targets = torch.from_numpy(datum.inputs["target_tokens"])
        logprobs.append((hidden[0] @ head.t()).log_softmax(-1).gather(1, targets[:, None])[:, 0])
        inputs: Mapping[str, Tensor] = {n: torch.from_numpy(v) for n, v in datum.inputs.items() if n != "target_tokens"}
        total = total + LOSSES[loss](logprobs[-1], inputs)[0]
    total.backward()
    gradients = {name: [(given(a), given(b)) for a, b in pairs] for name, pairs in leaves.items()}
    return [each.detach() for each in logprobs], float(total.detach()), gradients


def likelihood(model: Decoder, adapter: TrainedAdapter, leaves: Any, datum: Datum) -> Tensor:
    """log p of all targets, by W + scale B A, or without an adapter by W."""
    state = dict(model.named_parameters())
    state[f"{UNEMBEDDING}.weight"] = model.embedding.weight if model.head is None else state["head.weight"]
    added = {
        f"{name}.weight": adapter.scale * torch.cat([b @ a for a, b in pairs]) for name, pairs in (leaves or {}).items()
    }
    changed = {name: state[name] + more for name, more in added.items()}
    head = changed.pop(f"{UNEMBEDDING}.weight", state[f"{UNEMBEDDING}.weight"])
    hidden = functional_call(model, changed, (Batch(torch.from_numpy(datum.tokens.astype(np.int64))[None]),))
    targets = torch.from_numpy(datum.inputs["target_tokens"])
    return (hidden[0] @ head.t()).log_softmax(-1).gather(1, targets[:, None]).sum()


def given(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad


@pytest.mark.parametrize("loss", [name for name in LOSSES if name not in REFERRING])
def test_losses_and_gradients_are_those_of_autograd(trainer: SessionTrainer, loss: str) -> None:
    adapter = adapter_of(trainer)
    data = [rl_datum(5, 1), rl_datum(130, 2), rl_datum(64, 3)]
    outcome = done(trainer.forward_backward([Work(adapter, data, loss)])[0])
    logprobs, total, gradients = reference(trainer.model, adapter, data, loss)
    for own, expected in zip(outcome.logprobs, logprobs, strict=True):
        assert own == pytest.approx(expected.numpy(), abs=1e-5)
    assert outcome.metrics["loss:sum"] == pytest.approx(total, rel=1e-5, abs=1e-4)
    for name, pairs in adapter.gradient_factors.items():
        for (a, b), (expected_a, expected_b) in zip(pairs, gradients[name], strict=True):
            torch.testing.assert_close(a, expected_a, rtol=1e-3, atol=2e-4)
            torch.testing.assert_close(b, expected_b, rtol=1e-3, atol=2e-4)
    assert all(bool(b.abs().sum() > 0) for pairs in adapter.gradient_factors.values() for _, b in pairs)


def preference_of(better: Datum, worse: Datum) -> Datum:
    """With all of their tokens counted."""
    whole = [Datum(d.tokens, {**d.inputs, "weights": np.ones(len(d.tokens), np.float32)}) for d in (better, worse)]
    return preference_datum(*whole)


def test_a_preference_is_compared_with_the_model_without_its_adapter(trainer: SessionTrainer) -> None:
    adapter, untrained = adapter_of(trainer), trainer.create(rank=4, seed=0)
    pairs = [(datum_of(5, 1), datum_of(130, 2)), (datum_of(64, 3), datum_of(7, 4))]
    data = [preference_of(*pair) for pair in pairs]
    works = [Work(adapter, data, "dpo", {"beta": 0.3}), Work(untrained, data, "dpo", {"beta": 0.3})]
    outcome, first = (done(each) for each in trainer.forward_backward(works))
    assert first.metrics["loss:sum"] == pytest.approx(2 * math.log(2))  # nothing has been learned
    assert first.metrics["margin:mean"] == 0
    total = torch.zeros(())
    leaves = {
        name: [(a.clone().requires_grad_(), b.clone().requires_grad_()) for a, b in own]
        for name, own in adapter.factors.items()
    }
    for pair in pairs:
        now, before = ([likelihood(trainer.model, adapter, by, datum) for datum in pair] for by in (leaves, None))
        margin = (now[0] - now[1]) - (before[0] - before[1])
        total = total - (0.3 * margin).sigmoid().log()
    total.backward()
    assert outcome.metrics["loss:sum"] == pytest.approx(float(total.detach()), rel=1e-4)
    for name, factors in adapter.gradient_factors.items():
        for (a, b), (leaf_a, leaf_b) in zip(factors, leaves[name], strict=True):
            torch.testing.assert_close(a, given(leaf_a), rtol=1e-3, atol=2e-4)
            torch.testing.assert_close(b, given(leaf_b), rtol=1e-3, atol=2e-4)


def test_a_preference_gives_the_same_bits_whoever_else_is_there(trainer: SessionTrainer) -> None:
    data = [preference_of(datum_of(20, 1), datum_of(90, 2))]
    alone, together = adapter_of(trainer), adapter_of(trainer)
    expected = done(trainer.forward_backward([Work(alone, data, "dpo")])[0])
    mates = [Work(adapter_of(trainer, seed), [datum_of(33, seed)], "cross_entropy") for seed in (5, 6)]
    outcome = done(trainer.forward_backward([mates[0], Work(together, data, "dpo"), mates[1]])[1])
    assert outcome.metrics == expected.metrics
    assert torch.equal(alone.gradients, together.gradients)


def test_given_references_are_compared_with(trainer: SessionTrainer) -> None:
    datum = preference_of(datum_of(5, 1), datum_of(6, 2))
    adapter = adapter_of(trainer)
    own = done(trainer.forward_backward([Work(adapter, [datum], "dpo", forward_only=True)])[0]).logprobs[0]
    same = Datum(datum.tokens, {**datum.inputs, "logprobs": own})
    outcome = done(trainer.forward_backward([Work(adapter, [same], "dpo")])[0])
    assert outcome.metrics["loss:sum"] == pytest.approx(math.log(2), rel=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_the_unembedding_alone_can_be_trained(tied: bool) -> None:
    trainer = SessionTrainer(make_model(tied=tied))
    adapter = adapter_of(trainer, train_attn=False, train_mlp=False)
    data = [rl_datum(70, 1), rl_datum(5, 2)]
    done(trainer.forward_backward([Work(adapter, data, "ppo")])[0])
    _, _, gradients = reference(trainer.model, adapter, data, "ppo")
    for (a, b), (expected_a, expected_b) in zip(
        adapter.gradient_factors[UNEMBEDDING], gradients[UNEMBEDDING], strict=True
    ):
        torch.testing.assert_close(a, expected_a, rtol=1e-3, atol=2e-4)
        torch.testing.assert_close(b, expected_b, rtol=1e-3, atol=2e-4)
        assert bool(a.any())
        assert bool(b.any())


def test_what_no_gradient_reaches_costs_nothing_and_changes_no_bit(trainer: SessionTrainer) -> None:
    """Prompts have no weight: their logits are left out of the backward pass, whoever is beside them."""
    adapter, mate = adapter_of(trainer, 1), adapter_of(trainer, 2)
    weights = np.zeros(200, np.float32)
    weights[190:] = 1.0
    own = Work(adapter, [datum_of(200, 1, weights=weights), datum_of(30, 2)], "cross_entropy")
    alone = bits(trainer, [own], 0)
    assert bits(trainer, [own, Work(mate, [datum_of(64, 3)], "cross_entropy")], 0) == alone
    _, _, gradients = reference(trainer.model, adapter, list(own.data), "cross_entropy")
    for name, pairs in adapter.gradient_factors.items():
        torch.testing.assert_close(pairs[0][0], gradients[name][0][0], rtol=1e-3, atol=2e-4)


def test_a_loss_needs_no_more_than_its_line_among_the_losses(
    trainer: SessionTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(
        LOSSES, "twice", lambda logprobs, inputs: (2 * LOSSES["cross_entropy"](logprobs, inputs)[0], {})
    )
    works = [Work(adapter_of(trainer), [datum_of(9)], loss) for loss in ("twice", "cross_entropy")]
    twice, once = (done(outcome).metrics["loss:sum"] for outcome in trainer.forward_backward(works))
    assert twice == pytest.approx(2 * once, rel=1e-5)


def test_a_small_model_is_computed_by_one_thread(trainer: SessionTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    plain = LOSSES["cross_entropy"]

    def noting(logprobs: Tensor, inputs: Mapping[str, Tensor | float]) -> tuple[Tensor, dict[str, Tensor]]:
        found.append(torch.get_num_threads())
        return plain(logprobs, inputs)

    monkeypatch.setitem(LOSSES, "cross_entropy", noting)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        done(trainer.forward_backward([Work(adapter_of(trainer), [datum_of(9)], "cross_entropy")])[0])
        found.append(torch.get_num_threads())
    finally:
        torch.set_num_threads(num_threads)
    assert found == [1, 2]


@pytest.mark.parametrize("name", ["gpt2", "mistral sliding", "qwen3", "llama 3 rope"])
def test_every_family_can_be_trained(name: str, tmp_path: Path) -> None:
    assert name in FAMILIES
    make_reference(name).save_pretrained(tmp_path)
    trainer = SessionTrainer(read_model(tmp_path))
    adapter = adapter_of(trainer)
    data = [datum_of(20, 1), datum_of(9, 2)]
    outcome = done(trainer.forward_backward([Work(adapter, data, "cross_entropy")])[0])
    logprobs, total, gradients = reference(trainer.model, adapter, data, "cross_entropy")
    assert outcome.metrics["loss:sum"] == pytest.approx(total, abs=1e-4)
    assert outcome.logprobs[1] == pytest.approx(logprobs[1].numpy(), abs=1e-5)
    for matrix, pairs in adapter.gradient_factors.items():
        torch.testing.assert_close(pairs[0][1], gradients[matrix][0][1], rtol=1e-3, atol=2e-4)


def bits(trainer: SessionTrainer, works: list[Work], which: int) -> tuple[bytes, bytes]:
    """What one of the works has got, to the last bit: log-probabilities, and its session's gradient."""
    for work in works:
        work.trained.gradients.zero_()
    outcome = done(trainer.forward_backward(works)[which])
    logprobs = b"".join(each.tobytes() for each in outcome.logprobs)
    return logprobs, works[which].trained.gradients.numpy().tobytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [4, 8])
def test_company_changes_no_bit(dtype: torch.dtype, rank: int) -> None:
    trainer = SessionTrainer(make_model(dtype))
    adapters = [adapter_of(trainer, seed, rank if seed % 3 == 0 else 1 + 3 * seed) for seed in range(8)]
    own = Work(adapters[0], [rl_datum(70, 1), rl_datum(12, 2), rl_datum(70, 3)], "importance_sampling")
    alone = bits(trainer, [own], 0)
    mates = [Work(adapter, [rl_datum(30 + i, i)], "cross_entropy") for i, adapter in enumerate(adapters[1:], 1)]
    longer = [Work(adapter, [rl_datum(200, i), rl_datum(70, i)], "ppo") for i, adapter in enumerate(adapters[1:3], 1)]
    same_shape = [Work(adapter, [rl_datum(70, i)] * 3, "dro") for i, adapter in enumerate(adapters[1:5], 1)]
    only_forward = [Work(adapter, mates[0].data, "cross_entropy", forward_only=True) for adapter in adapters[1:2]]
    for company in (mates, longer, same_shape, only_forward):
        assert bits(trainer, [own, *company], 0) == alone
        assert bits(trainer, [*company, own], len(company)) == alone, "in another order"


@pytest.mark.parametrize("max_pass_tokens", [1, 80, 200])
def test_how_it_is_cut_into_passes_changes_no_bit(max_pass_tokens: int) -> None:
    model = make_model()
    whole, parts = SessionTrainer(model), SessionTrainer(model, max_pass_tokens=max_pass_tokens)
    own = Work(adapter_of(whole), [rl_datum(70, 1), two_targets(12), rl_datum(90, 3)], "cross_entropy")
    assert bits(parts, [own], 0) == bits(whole, [own], 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_that_are_computed_again_change_no_bit(dtype: torch.dtype) -> None:
    """With the adapters in the second forward pass too."""
    model = make_model(dtype)
    trainer = SessionTrainer(model)
    works = [Work(adapter_of(trainer, seed), [rl_datum(70, 1), rl_datum(12, 2)], "ppo") for seed in range(2)]
    kept = bits(trainer, works, 1)
    whole = Work(trainer.create_whole(), works[0].data, "ppo")
    kept_whole = bits(trainer, [whole], 0)
    num_blocks = 0

    def count(*_: object) -> None:
        nonlocal num_blocks
        num_blocks += 1

    model.gradient_checkpointing = True
    hook = model.blocks[0].register_forward_pre_hook(count)
    again = Work(trainer.create_whole(), works[0].data, "ppo")
    assert bits(trainer, works, 1) == kept
    assert num_blocks == 2
    assert bits(trainer, [again], 0) == kept_whole
    hook.remove()


def test_gradients_add_up_until_the_step(trainer: SessionTrainer) -> None:
    once, twice = adapter_of(trainer), adapter_of(trainer)
    data = [datum_of(30, 1), datum_of(50, 2)]
    trainer.forward_backward([Work(once, data, "cross_entropy")])
    trainer.forward_backward([Work(twice, data[:1], "cross_entropy")])
    trainer.forward_backward([Work(twice, data[1:], "cross_entropy")])
    assert torch.equal(once.gradients, twice.gradients)
    trainer.optim_step(once, OptimSettings())
    assert not once.gradients.any()


def test_forward_alone_gives_the_same_and_no_gradient(trainer: SessionTrainer) -> None:
    adapter = adapter_of(trainer)
    data = [datum_of(40, 1)]
    forward = done(trainer.forward_backward([Work(adapter, data, "cross_entropy", forward_only=True)])[0])
    assert not adapter.gradients.any()
    both = done(trainer.forward_backward([Work(adapter, data, "cross_entropy")])[0])
    assert forward.logprobs[0] == pytest.approx(both.logprobs[0], abs=1e-5)


def test_several_targets_at_each_place(trainer: SessionTrainer) -> None:
    adapter, single = adapter_of(trainer), datum_of(10, 1)
    targets = np.stack([single.inputs["target_tokens"], np.full(10, 3)], axis=1)
    weights = np.tile(np.array([0.25, 0.75], np.float32), (10, 1))
    several = Datum(single.tokens, {"target_tokens": targets, "weights": weights})
    outcome = done(trainer.forward_backward([Work(adapter, [several, single], "cross_entropy")])[0])
    assert [each.shape for each in outcome.logprobs] == [(10, 2), (10,)]
    assert outcome.logprobs[0][:, 0] == pytest.approx(outcome.logprobs[1], abs=1e-6)
    expected = -(outcome.logprobs[0] * weights).sum() - (outcome.logprobs[1] * single.inputs["weights"]).sum()
    assert outcome.metrics["loss:sum"] == pytest.approx(float(expected), abs=1e-4)


def test_a_step_is_that_of_adamw(trainer: SessionTrainer) -> None:
    adapter = adapter_of(trainer)
    weights = adapter.masters.clone().requires_grad_()
    settings = OptimSettings(learning_rate=0.01, beta1=0.8, beta2=0.9, eps=1e-8, weight_decay=0.1, grad_clip_norm=0.5)
    theirs = torch.optim.AdamW([weights], lr=0.01, betas=(0.8, 0.9), eps=1e-8, weight_decay=0.1)
    for number in range(3):
        trainer.forward_backward([Work(adapter, [datum_of(20, number)], "cross_entropy")])
        weights.grad = adapter.gradients.clone()
        norm = torch.nn.utils.clip_grad_norm_([weights], 0.5)
        theirs.step()
        metrics = trainer.optim_step(adapter, settings)
        assert metrics["grad_norm"] == pytest.approx(float(norm), rel=1e-5)
        torch.testing.assert_close(adapter.masters, weights.detach(), rtol=1e-5, atol=1e-6)


def test_a_step_of_one_moves_no_other(trainer: SessionTrainer) -> None:
    first, second = adapter_of(trainer, 1), adapter_of(trainer, 2)
    trainer.forward_backward([Work(each, [datum_of(20)], "cross_entropy") for each in (first, second)])
    weights, gradients = second.masters.clone(), second.gradients.clone()
    trainer.optim_step(first, OptimSettings())
    assert torch.equal(second.masters, weights)
    assert torch.equal(second.gradients, gradients)


WRONG: dict[str, tuple[Datum, str]] = {
    "unknown loss 'magic'": (datum_of(4), "magic"),
    "ppo needs logprobs": (datum_of(4), "ppo"),
    "the model's context is 256": (datum_of(257), "cross_entropy"),
    "target_tokens has token ids outside": (datum_of(2, target_tokens=np.array([0, VOCAB])), "cross_entropy"),
    "the model input has token ids outside": (Datum(np.array([-1], np.int32), datum_of(1).inputs), "cross_entropy"),
    "weights has the shape [3]": (datum_of(4, weights=np.zeros(3, np.float32)), "cross_entropy"),
}


@pytest.mark.parametrize("words", WRONG)
def test_a_wrong_work_takes_no_other_with_it(trainer: SessionTrainer, words: str) -> None:
    datum, loss = WRONG[words]
    wrong, right = adapter_of(trainer, 1), adapter_of(trainer, 2)
    alone = bits(trainer, [Work(right, [datum_of(9)], "cross_entropy")], 0)
    right.gradients.zero_()
    outcomes = trainer.forward_backward(
        [Work(wrong, [datum_of(4), datum], loss), Work(right, [datum_of(9)], "cross_entropy")]
    )
    assert isinstance(outcomes[0], InvalidInput)
    assert words in str(outcomes[0])
    assert (done(outcomes[1]).logprobs[0].tobytes(), right.gradients.numpy().tobytes()) == alone
    with pytest.raises(TrainingError, match="has failed"):
        trainer.optim_step(wrong, OptimSettings())
    trainer.forward_backward([Work(wrong, [datum_of(4)], "cross_entropy")])
    trainer.optim_step(wrong, OptimSettings())  # a new window


def test_a_loss_that_is_not_finite_fails_alone(trainer: SessionTrainer) -> None:
    wrong, right = adapter_of(trainer, 1), adapter_of(trainer, 2)
    alone = bits(trainer, [Work(right, [datum_of(9)], "cross_entropy")], 0)
    right.gradients.zero_()
    endless = datum_of(4, weights=np.array([0, np.inf, 0, 0], np.float32))
    outcomes = trainer.forward_backward(
        [Work(wrong, [endless], "cross_entropy"), Work(right, [datum_of(9)], "cross_entropy")]
    )
    assert isinstance(outcomes[0], NonFiniteLoss)
    assert not wrong.gradients.any()
    assert (done(outcomes[1]).logprobs[0].tobytes(), right.gradients.numpy().tobytes()) == alone


def test_quantized_weights_are_refused() -> None:
    model = make_model()
    quantize(model, "int8")
    with pytest.raises(InvalidInput, match="without --quantize"):
        SessionTrainer(model)


@pytest.mark.parametrize("num_bytes", [0, 61 * 128 * 4 + 1, 2**30])
def test_logits_that_are_computed_again_are_the_kept_ones(monkeypatch: pytest.MonkeyPatch, num_bytes: int) -> None:
    trainer = SessionTrainer(make_model())
    works = [Work(adapter_of(trainer, seed), [rl_datum(70, 1), rl_datum(190, 2)], "ppo") for seed in range(2)]
    expected = bits(trainer, works, 1)
    monkeypatch.setattr(target_logprobs, "MAX_KEPT_BYTES", num_bytes)
    assert bits(trainer, works, 1) == expected


@pytest.mark.parametrize("is_whole", [False, True], ids=["adapter", "all weights"])
def test_in_bfloat16_the_sampler_finds_what_the_trainer_does(is_whole: bool) -> None:
    """Prompts in one step and tokens that were drawn one by one; heads are wide enough for all kernels."""
    model = make_model(torch.bfloat16, n_embd=64)
    trainer = SessionTrainer(model)
    trained = trainer.create_whole() if is_whole else adapter_of(trainer, rank=8)
    engine = Engine(model)
    if isinstance(trained, TrainedAdapter):
        engine.adapters.keep("a", trained.as_adapter(), ())
    params = SamplingParams(max_tokens=40, seed=1, num_prompt_logprobs=0, ignore_eos=True)
    drawn = Sequence(datum_of(90).tokens.tolist(), params, adapter=None if is_whole else "a")
    engine.add(drawn)
    while engine.has_work:
        engine.step()
    tokens = np.array([*drawn.prompt_ids, *drawn.output_ids])
    datum = Datum(tokens[:-1].astype(np.int32), {"target_tokens": tokens[1:].astype(np.int64)})
    [found] = done(trainer.forward_backward([Work(trained, [datum], "cross_entropy")])[0]).logprobs
    expected = np.array([*drawn.prompt_logprobs[1:], *drawn.logprobs], np.float32)
    assert np.abs(found - expected).max() < 2e-2
    assert np.square(found - expected).mean() / 2 < 1e-3  # their divergence, as Tinker's cookbook estimates it


def test_a_forward_pass_alone_is_the_same_bits_as_one_with_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels for few rows round in their own way, so that nobody's company may decide about them."""
    monkeypatch.setattr(kernels._BUILD, "built", built_kernels())
    trainer = SessionTrainer(make_model())
    adapter = adapter_of(trainer)
    data = [datum_of(40, 1), datum_of(9, 2)]
    longer = [datum_of(200, 3)] * 4
    mates = [Work(adapter_of(trainer, seed), longer, "cross_entropy", forward_only=True) for seed in (1, 2)]
    alone, both = (Work(adapter, data, "cross_entropy", forward_only=only) for only in (True, False))
    found = [done(trainer.forward_backward(works)[0]).logprobs for works in ([alone], [alone, *mates], [both])]
    assert len({b"".join(each.tobytes() for each in logprobs) for logprobs in found}) == 1
