"""Errors travel by name; what this version does not know is still an error."""

import inspect

import pytest

from smelt import errors
from smelt.errors import DataError, NotFound, Overloaded, SmeltError, Unavailable, WorkerLost
from smelt.transport.failures import error_of, failure_of, is_of_the_user
from smelt.transport.messages import Failure

KINDS = [kind for _, kind in inspect.getmembers(errors, inspect.isclass)]


@pytest.mark.parametrize("kind", KINDS)
def test_every_error_arrives_as_what_it_was(kind: type[SmeltError]) -> None:
    arrived = error_of(failure_of(kind("why")))
    assert type(arrived) is kind
    assert str(arrived) == "why"


def test_what_is_wrong_and_when_to_ask_again_arrive_too() -> None:
    wrong = error_of(failure_of(DataError("why", "prompt")))
    assert isinstance(wrong, DataError)
    assert wrong.param == "prompt"
    full = error_of(failure_of(Overloaded("why", 7)))
    assert isinstance(full, Overloaded)
    assert full.retry_after_s == 7


def test_a_bug_tells_its_kind_and_no_more() -> None:
    failure = failure_of(KeyError("/home/ann/secret"))
    assert failure.error == "SmeltError"
    assert "KeyError" in failure.message
    assert "secret" not in failure.message


@pytest.mark.parametrize("name", ["NoSuchError", "KeyError", "annotations", "__name__"])
def test_an_unknown_name_is_the_root(name: str) -> None:
    assert type(error_of(Failure(name, "why"))) is SmeltError


@pytest.mark.parametrize(("error", "expected"), [(NotFound, True), (DataError, True), (WorkerLost, False)])
def test_whose_fault_it_was(error: type[SmeltError], expected: bool) -> None:
    assert is_of_the_user(failure_of(error("why"))) is expected
    assert not is_of_the_user(failure_of(Unavailable("why")))
