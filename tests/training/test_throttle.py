"""A throttled thread rests in proportion to its work, for no longer than allowed, and not at all once waited for."""

import threading
import time

import pytest

from smelt.training.throttle import Throttle


def busy(seconds: float) -> None:
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        pass


def test_rests_are_in_proportion_to_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    throttle = Throttle(0.02, 100.0)
    rests: list[float] = []
    monkeypatch.setattr(throttle.hurried, "wait", rests.append)
    throttle.begin()
    for work in (0.01, 0.03):
        busy(work)
        throttle.rest()
    assert rests[0] == pytest.approx(0.01 * 49, rel=0.1)
    assert rests[1] == pytest.approx(0.03 * 49, rel=0.1)


def test_rests_end_when_their_time_is_used_up(monkeypatch: pytest.MonkeyPatch) -> None:
    throttle = Throttle(1e-3, 15.0)
    rests: list[float] = []
    monkeypatch.setattr(throttle.hurried, "wait", rests.append)
    throttle.begin()
    for _ in range(3):
        busy(0.01)
        throttle.rest()
    assert rests[0] == pytest.approx(10, rel=0.2)
    assert sum(rests) == 15.0
    assert rests[2] == 0.0


def test_a_whole_core_means_no_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    throttle = Throttle(1.0, 100.0)
    rests: list[float] = []
    monkeypatch.setattr(throttle.hurried, "wait", rests.append)
    throttle.begin()
    busy(0.01)
    throttle.rest()
    assert rests == [0.0]


def test_who_waits_ends_the_rest_at_once() -> None:
    throttle = Throttle(1e-9, 1e9)

    def work() -> None:
        throttle.begin()
        for _ in range(3):
            busy(0.001)
            throttle.rest()  # the first alone would last for days

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    throttle.hurry()
    thread.join(30)
    assert not thread.is_alive()
