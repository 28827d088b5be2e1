"""The step and the flat optimizer against plain torch: autograd, clip_grad_norm_ and AdamW per parameter."""

import copy
import math

import pytest
import torch
from torch import Tensor

from smelt.configs import DecoderConfig
from smelt.models.batch import NO_TARGET, Batch
from smelt.models.decoder import Decoder
from smelt.training.losses import on_tokens
from smelt.training.optim import LossScale, Optimizer, cosine_with_warmup
from smelt.training.step import measure, step

SHAPE = DecoderConfig(vocab_size=31, block_size=16, n_layer=2, n_head=2, n_embd=16)
LOSS = on_tokens("cross_entropy")
LEARNING_RATE = 1e-2


def make_model(seed: int = 0) -> Decoder:
    model = Decoder(SHAPE)
    model.initialize(seed)
    return model


def make_batch(seed: int, num_rows: int = 4) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(31, (num_rows, 17), generator=generator)
    return Batch(rows[:, :-1], rows[:, 1:])


def plain_adamw(model: Decoder, betas: tuple[float, float], weight_decay: float) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    return torch.optim.AdamW(
        [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=LEARNING_RATE,
        betas=betas,
        fused=False,
        foreach=False,
    )


def test_training_equals_plain_torch_with_decay_and_clipping() -> None:
    # Without key biases: their gradient is zero but for rounding, which AdamW would blow up to whole steps.
    model, reference = (Decoder(SHAPE.replace(qkv_bias=False)) for _ in range(2))
    for decoder in (model, reference):
        decoder.initialize(0)
    optimizer = Optimizer(model, torch.float32, (0.9, 0.95), weight_decay=0.3, grad_clip=0.5)
    plain = plain_adamw(reference, (0.9, 0.95), 0.3)
    for number in range(8):
        batch = make_batch(number)
        value = step(model, batch, LOSS, 1 / batch.num_targets)
        norm = optimizer.step(LEARNING_RATE)
        total = torch.nn.functional.cross_entropy(
            reference.logits(reference(batch)).flatten(0, 1), batch.targets.flatten(), reduction="sum"
        )
        (total / batch.num_targets).backward()
        plain_norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
        plain.step()
        plain.zero_grad()
        assert value.total.item() == pytest.approx(total.item(), rel=1e-5)
        assert norm == pytest.approx(plain_norm.item(), rel=1e-4)
    for (name, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, msg=name)


def test_vectors_do_not_decay_and_matrices_do() -> None:
    model = make_model()
    optimizer = Optimizer(model, torch.float32, (0.9, 0.95), weight_decay=0.5, grad_clip=0.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.step(0.1)  # zero gradients: only the decay acts
    for name, parameter in model.named_parameters():
        factor = 1 - 0.1 * 0.5 if parameter.dim() >= 2 else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * factor)


def test_micro_batches_add_up_to_the_whole_batch() -> None:
    whole, parts = make_model(), make_model()
    first = Optimizer(whole, torch.float32, (0.9, 0.95), 0.0, 0.0)
    second = Optimizer(parts, torch.float32, (0.9, 0.95), 0.0, 0.0)
    batch = make_batch(3, num_rows=8)
    step(whole, batch, LOSS, 1 / 128)
    for rows in (slice(0, 3), slice(3, 8)):
        step(parts, Batch(batch.tokens[rows], batch.targets[rows]), LOSS, 1 / 128)
    for one, other in zip(first.gradients(), second.gradients(), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_keeps_fp32_masters_and_gradients(dtype: torch.dtype) -> None:
    model = make_model()
    optimizer = Optimizer(model, dtype, (0.9, 0.95), 0.1, 1.0)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert {g.dtype for g in optimizer.gradients()} == {torch.float32}
    batch = make_batch(0)
    scale = optimizer.loss_scale.value if optimizer.loss_scale else 1.0
    losses = []
    for _ in range(30):
        losses.append(step(model, batch, LOSS, scale / batch.num_targets).total.item())
        optimizer.step(1e-2)
    assert losses[-1] < 0.5 * losses[0]
    masters = optimizer.named(optimizer.buffers(), "masters")
    for name, parameter in model.named_parameters():
        assert parameter.grad is None, "rounded gradients must not linger"
        assert torch.equal(parameter.detach(), masters[name].to(dtype))


def test_many_small_gradients_survive_in_fp32_where_bf16_sums_would_lose_them() -> None:
    model = torch.nn.Linear(1, 1, bias=False)
    optimizer = Optimizer(model, torch.bfloat16, (0.9, 0.95), 0.0, 0.0)
    for _ in range(1000):
        (model.weight * 1.0).sum().backward()
    assert optimizer.gradients()[0].max().item() == 1000.0  # a bf16 sum stalls at 256


def test_gradients_that_are_not_finite_move_nothing() -> None:
    model = make_model()
    optimizer = Optimizer(model, torch.float32, (0.9, 0.95), 0.1, 1.0)
    before = copy.deepcopy(model.state_dict())
    optimizer.gradients()[0][0] = math.inf
    assert optimizer.step(0.1) is None
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert optimizer.num_steps == 0
    assert not optimizer.gradients()[0].any()


def test_loss_scale_halves_on_overflow_and_doubles_after_many_good_steps() -> None:
    scale = LossScale(1024.0)
    scale.overflowed()
    assert scale.value == 512.0
    for _ in range(2000):
        scale.succeeded()
    assert (scale.value, scale.num_good_steps) == (1024.0, 0)


def test_measure_uses_no_dropout_and_leaves_no_gradient() -> None:
    model = Decoder(SHAPE, dropout=0.5)
    model.initialize(0)
    model.train()
    batch = make_batch(0)
    values = {measure(model, batch, LOSS).total.item() for _ in range(3)}
    assert len(values) == 1
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def test_positions_without_a_target_have_no_loss() -> None:
    model = make_model()
    batch = make_batch(0)
    targets = batch.targets.clone()
    targets[:, :8] = NO_TARGET
    half = Batch(batch.tokens, targets)
    value = measure(model, half, LOSS)
    logprobs: Tensor = torch.log_softmax(model.logits(model(batch)), -1)
    expected = -logprobs.gather(-1, batch.targets[..., None])[:, 8:].sum()
    assert value.num_targets == 32
    torch.testing.assert_close(value.total, expected.detach())


def test_weights_scale_each_target() -> None:
    model = make_model()
    batch = make_batch(0)
    batch.loss_inputs["weights"] = torch.full_like(batch.tokens, 3, dtype=torch.float32)
    weighted = measure(model, batch, LOSS).total
    batch.loss_inputs.clear()
    torch.testing.assert_close(weighted, 3 * measure(model, batch, LOSS).total)


def test_schedule_warms_up_decays_and_stays_at_the_floor() -> None:
    schedule = [cosine_with_warmup(step, 1.0, 0.1, 10, 110) for step in range(130)]
    assert schedule[0] == pytest.approx(1 / 11)
    assert schedule[10] == 1.0
    assert schedule[60] == pytest.approx(0.55)
    assert schedule[110:] == [0.1] * 20
    assert all(after <= before for before, after in zip(schedule[10:], schedule[11:], strict=False))


def test_gradient_checkpointing_changes_no_gradient() -> None:
    plain, saving = make_model(), make_model()
    saving.gradient_checkpointing = True
    batch = make_batch(1)
    step(plain.train(), batch, LOSS)
    step(saving.train(), batch, LOSS)
    for one, other in zip(plain.parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
