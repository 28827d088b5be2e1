"""Figures of sessions: what comes of noted results, step by step, and that their file stays small."""

from pathlib import Path

import numpy as np
import pytest

from noted_session import LANE, NotedSession, done, row
from smelt.control import session_figures
from smelt.control.session_figures import SessionFigures, figures_file
from smelt.transport.messages import Failure, Result


@pytest.fixture
def figures(tmp_path: Path) -> SessionFigures:
    return SessionFigures(tmp_path)


def test_a_step_has_the_losses_and_samples_before_it(figures: SessionFigures) -> None:
    session = NotedSession(figures)
    session.sample(LANE)
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
    session = NotedSession(figures)
    session.loss(100.0, forward_only=True)
    session.loss(8.0)
    session.step()
    session.step()
    figures.close()
    steps, _ = figures.steps(LANE)
    assert [step.loss for step in steps] == [2.0, None]


def test_what_failed_and_what_belongs_to_no_model_is_not_noted(figures: SessionFigures, tmp_path: Path) -> None:
    session = NotedSession(figures)
    session.sample(lane=None)
    figures.note(row("optim_step", 1, b"", LANE), Result("f", 1, failure=Failure("InvalidInput", "no")))
    figures.note(row("save_weights", 2, b"", LANE), done(b"{}"))
    figures.close()
    assert figures.steps(LANE) == ([], 1)
    assert not (tmp_path / "sessions").exists()


def test_steps_are_read_as_they_come(figures: SessionFigures) -> None:
    session = NotedSession(figures)
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
    session = NotedSession(figures)
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
    NotedSession(figures).step()
    figures.close()
    assert len(figures.steps(LANE)[0]) == 1
