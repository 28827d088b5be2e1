"""Figures of sessions: what comes of noted results, step by step, and that their file stays small."""

from pathlib import Path

import msgspec
import numpy as np
import pytest

from smelt.control import session_figures
from smelt.control.session_figures import SessionFigures, figures_file
from smelt.storage.futures import Granted
from smelt.transport.messages import Failure, Result
from smelt.transport.operations import OptimStep, Sample, Sampler
from smelt.transport.tinker_wire import Sampled, encode_data, encode_outputs, encode_samples, with_loss
from smelt.types import Datum, SamplingParams

LANE = "s:train:0"
TOKENS = np.arange(4, dtype=np.int32)


def row(kind: str, seq: int | None, request: bytes, lane: str = LANE) -> Granted:
    return Granted(f"f{seq}", "ann", kind, lane, seq, 0, request)


def done(body: bytes) -> Result:
    return Result("f", 1, body)


class Session:
    """A client whose operations are done at once."""

    def __init__(self, figures: SessionFigures) -> None:
        self.figures = figures
        self.seq = 0

    def loss(self, total: float, *, forward_only: bool = False, **inputs: np.ndarray) -> None:
        self.seq += 1
        data = encode_data([Datum(TOKENS, {"target_tokens": TOKENS.astype(np.int64), **inputs})])
        request = with_loss(data, LANE, "cross_entropy", {}, forward_only)
        answer = encode_outputs([np.zeros(4, np.float32)], {"loss:sum": total})
        self.figures.note(row("forward_backward", self.seq, request), done(answer))

    def step(self) -> None:
        self.seq += 1
        request = msgspec.msgpack.encode(OptimStep(learning_rate=0.5))
        answer = msgspec.json.encode({"type": "optim_step", "metrics": {"grad_norm": 2.0}})
        self.figures.note(row("optim_step", self.seq, request), done(answer))

    def sample(self, lane: str | None = LANE) -> None:
        request = msgspec.msgpack.encode(Sample(Sampler("s:sample:0", "tiny", lane=lane), (1, 2), SamplingParams()))
        answer = encode_samples([Sampled([1, 2, 3], [-1.0, -2.0, -3.0], True), Sampled([1], [-2.0], True)])
        self.figures.note(row("sample", None, request, "s:sample:0"), done(answer))


@pytest.fixture
def figures(tmp_path: Path) -> SessionFigures:
    return SessionFigures(tmp_path)


def test_a_step_has_the_losses_and_samples_before_it(figures: SessionFigures) -> None:
    session = Session(figures)
    session.sample()
    figures.tell(LANE, {"reward": 0.25})
    session.loss(6.0, weights=np.array([0, 1, 1, 0], np.float32))
    session.loss(2.0, weights=np.array([0, 0, 1, 1], np.float32))
    session.step()
    session.loss(9.0, advantages=np.array([0, 0, -2, 1], np.float32))
    session.step()
    figures.close()
    (first, second), _ = figures.steps(LANE)
    assert (first.step, first.loss, first.grad_norm, first.learning_rate) == (1, 2.0, 2.0, 0.5)
    assert (first.num_tokens, first.num_samples, first.tokens_per_sample, first.sample_logprob) == (8, 2, 2.0, -2.0)
    assert first.told == {"reward": 0.25}
    assert first.tokens_per_second is None
    assert (second.step, second.loss, second.num_samples, second.told) == (2, 4.5, 0, {})
    assert second.tokens_per_second is not None
    assert second.tokens_per_second == pytest.approx(4 / (second.time - first.time))


def test_without_weights_each_token_counts_and_what_has_no_gradient_does_not(figures: SessionFigures) -> None:
    session = Session(figures)
    session.loss(100.0, forward_only=True)
    session.loss(8.0)
    session.step()
    session.step()
    figures.close()
    steps, _ = figures.steps(LANE)
    assert [step.loss for step in steps] == [2.0, None]


def test_what_failed_and_what_belongs_to_no_model_is_not_noted(figures: SessionFigures, tmp_path: Path) -> None:
    session = Session(figures)
    session.sample(lane=None)
    figures.note(row("optim_step", 1, b""), Result("f", 1, failure=Failure("InvalidInput", "no")))
    figures.note(row("save_weights", 2, b""), done(b"{}"))
    figures.close()
    assert figures.steps(LANE) == ([], 1)
    assert not (tmp_path / "sessions").exists()


def test_steps_are_read_as_they_come(figures: SessionFigures) -> None:
    session = Session(figures)
    for number in range(1, 4):
        session.loss(8.0)
        session.step()
        figures.tell("s:train:1", {}).result()  # all before it is written
        assert [step.step for step in figures.steps(LANE)[0]] == list(range(1, number + 1))


def test_a_long_session_keeps_a_small_file_and_its_newest_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_figures, "MAX_BYTES", 20_000)
    figures = SessionFigures(tmp_path)
    session = Session(figures)
    for number in range(600):
        if number == 10:
            figures.tell("s:train:1", {}).result()  # all before it is written
            assert figures.steps(LANE)[1] == 1
        session.loss(8.0)
        session.step()
    figures.close()
    assert figures_file(tmp_path, LANE).stat().st_size <= 20_000 + 500
    steps, num_readings = figures.steps(LANE)
    numbers = [step.step for step in steps]
    assert num_readings > 1
    assert numbers == sorted(set(numbers))
    assert numbers[-20:] == list(range(581, 601))
    assert numbers[0] == 1
    assert all(step.loss == 2.0 for step in steps)


def test_half_a_line_is_passed_over(figures: SessionFigures, tmp_path: Path) -> None:
    path = figures_file(tmp_path, LANE)
    path.parent.mkdir(parents=True)
    path.write_bytes(b'{"kind": "lo\n')
    Session(figures).step()
    figures.close()
    assert len(figures.steps(LANE)[0]) == 1
