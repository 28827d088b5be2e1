"""When compiling is chosen, and that a failing compiler costs a note and not the run."""

from typing import Any

import pytest
import torch
from torch._inductor.exc import InductorError

from smelt.run_configs import TrainConfig
from smelt.training import compiling
from smelt.training.compiling import compiled, wants_compile
from smelt.training.losses import on_tokens
from smelt.training.metrics import Event, Note
from smelt.training.step import step
from tests.training.test_step_and_optim import make_batch, make_model

CPU = torch.device("cpu")
AN_HOUR_OF_FLOPS = 10**16


def test_a_failing_compiler_is_noted_once_and_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_loss: Any) -> Any:
        def run(*_arguments: Any) -> Any:
            raise InductorError(RuntimeError("no C++ compiler\nand more"), None)

        return run

    monkeypatch.setattr(torch, "compile", broken)
    events: list[Event] = []
    loss = on_tokens("cross_entropy")
    wrapped = compiled(loss, [events.append])
    model, batch = make_model(), make_batch(0)
    values = [step(model, batch, wrapped).total for _ in range(3)]
    expected = step(model, batch, loss).total
    assert all(torch.equal(value, expected) for value in values)
    assert len(events) == 1
    assert isinstance(events[0], Note)
    assert "going on without it" in events[0].text
    assert "no C++ compiler" in events[0].text


@pytest.mark.parametrize(
    ("choice", "has_fast_bf16", "num_flops", "expected"),
    [
        ("auto", True, AN_HOUR_OF_FLOPS, True),
        ("auto", True, 10**9, False),
        ("auto", False, AN_HOUR_OF_FLOPS, False),
        ("true", False, 0, True),
        ("false", True, AN_HOUR_OF_FLOPS, False),
    ],
)
def test_auto_compiles_long_runs_where_it_pays(
    monkeypatch: pytest.MonkeyPatch, choice: Any, has_fast_bf16: bool, num_flops: int, expected: bool
) -> None:
    monkeypatch.setattr(compiling, "has_fast_bfloat16", lambda _device: has_fast_bf16)
    monkeypatch.setattr(compiling, "has_compiler", lambda: True)
    monkeypatch.setattr(compiling, "matmul_peak", lambda _device, _dtype: 1e12)
    assert wants_compile(TrainConfig(compile=choice), num_flops, CPU, torch.bfloat16) is expected


def test_without_a_compiler_auto_stays_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "has_compiler", lambda: False)
    assert not wants_compile(TrainConfig(), AN_HOUR_OF_FLOPS, CPU, torch.bfloat16)
