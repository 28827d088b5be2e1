"""Limits: any minute holds what it may and no more, and what came in is let out again."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smelt.api.limits import MINUTE_S, Limits, Window
from smelt.control.keys import LOCAL, Caller
from smelt.errors import RateLimited, Unavailable


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def caller(**limits: int) -> Caller:
    return Caller("ann", "k", frozenset({"inference"}), **limits)


@given(limit=st.integers(1, 5), waits=st.lists(st.floats(0, 40), max_size=40))
def test_no_minute_holds_more_than_the_limit(limit: int, waits: list[float]) -> None:
    clock, taken = Clock(), []
    window = Window(limit, clock)
    for wait in waits:
        clock.now += wait
        in_last_minute = sum(time > clock.now - MINUTE_S for time in taken)
        assert window.num_left == limit - in_last_minute
        assert window.take() == (in_last_minute < limit)
        if in_last_minute < limit:
            taken.append(clock.now)


def test_a_refusal_says_when_there_is_room_again() -> None:
    clock = Clock()
    allowance = Limits(clock=clock).allowance(caller(requests_per_minute=2))
    assert allowance is not None
    allowance.enter()
    clock.now += 10
    allowance.enter()
    clock.now += 10.5
    with pytest.raises(RateLimited, match="2 requests per minute; try again in 40 s") as refused:
        allowance.enter()
    assert refused.value.retry_after_s == 40
    assert dict(allowance.headers())[b"x-ratelimit-reset-requests"] == b"49.50s"
    clock.now += 39.5
    allowance.enter()


def test_what_is_refused_is_not_counted() -> None:
    limits = Limits(clock=Clock())
    allowance = limits.allowance(caller(requests_per_minute=2, max_concurrent=1))
    assert allowance is not None
    allowance.enter()
    for _ in range(5):
        with pytest.raises(RateLimited, match="1 requests at once"):
            allowance.enter()
    assert dict(allowance.headers())[b"x-ratelimit-remaining-requests"] == b"1"
    allowance.leave()
    allowance.enter()
    assert limits.allowance(caller(requests_per_minute=2, max_concurrent=1)) is allowance


def test_whoever_has_no_limit_has_no_allowance() -> None:
    assert Limits().allowance(LOCAL) is None
    assert Limits().allowance(caller()) is None


def test_the_server_takes_so_many_at_once() -> None:
    limits = Limits(max_in_flight=2)
    limits.enter()
    limits.enter()
    with pytest.raises(Unavailable, match="2 requests in hand"):
        limits.enter()
    limits.leave()
    limits.enter()
