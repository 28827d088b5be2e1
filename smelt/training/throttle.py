"""Throttle: a thread that works beside training takes a small share of a core, unless it is waited for or late.

Knows nothing of the work.
"""

import threading
import time


class Throttle:
    """The rests of one thread, in proportion to the processor time that it used, and how long they may be in all."""

    def __init__(self, share: float, seconds_of_rest: float) -> None:
        self.rest_per_work = 1 / share - 1
        self.seconds_left = seconds_of_rest
        self.hurried = threading.Event()
        self.worked_until = 0.0

    def begin(self) -> None:
        """Count the calling thread's work from here."""
        self.worked_until = time.thread_time()

    def rest(self) -> None:
        """Called by that thread after each piece of work: sleep, or return at once where the rests are used up."""
        worked = time.thread_time() - self.worked_until
        seconds = min(worked * self.rest_per_work, self.seconds_left)
        self.seconds_left -= seconds
        self.hurried.wait(seconds)
        self.worked_until = time.thread_time()

    def hurry(self) -> None:
        """No more rests: somebody waits for the work to be done."""
        self.hurried.set()
