import signal
import threading

import pytest

from smelt.inference.interrupts import interrupts_deferred


def interrupted_twice(done: list[int]) -> None:
    with interrupts_deferred():
        signal.raise_signal(signal.SIGINT)
        done.append(1)
        signal.raise_signal(signal.SIGINT)  # whoever holds the key down means the same
        done.append(2)


def interrupted_and_failing() -> None:
    with interrupts_deferred():
        signal.raise_signal(signal.SIGINT)
        raise ZeroDivisionError


def test_an_interrupt_comes_once_and_when_the_block_has_ended() -> None:
    done: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        interrupted_twice(done)
    assert done == [1, 2]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_failure_is_what_is_raised() -> None:
    with pytest.raises(ZeroDivisionError):
        interrupted_and_failing()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_program_that_handles_the_signal_goes_on_doing_so() -> None:
    received = []
    previous = signal.signal(signal.SIGINT, lambda number, _frame: received.append(number))
    try:
        with interrupts_deferred():
            signal.raise_signal(signal.SIGINT)
            assert received == [signal.SIGINT]
    finally:
        signal.signal(signal.SIGINT, previous)


def test_other_threads_have_nothing_to_defer() -> None:
    handlers = []

    def look() -> None:
        with interrupts_deferred():
            handlers.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert handlers == [signal.default_int_handler]
