"""Throttle: a thread that works beside training takes a small share of a core until somebody waits for it.

Knows nothing of the work.
"""

import threading
import time


class Throttle:
    """The rests of one thread, in proportion to the processor time that it used."""

    def __init__(self, share: float) -> None:
        self.rest_per_work = 1 / share - 1
        self.hurried = threading.Event()
        self.worked_until = 0.0

    def begin(self) -> None:
        """Count the calling thread's work from here."""
        self.worked_until = time.thread_time()

    def rest(self) -> None:
        """Called by that thread after each piece of work: sleep, or return at once where somebody waits."""
        worked = time.thread_time() - self.worked_until
        self.hurried.wait(worked * self.rest_per_work)
        self.worked_until = time.thread_time()

    def hurry(self) -> None:
        """No more rests: somebody waits for the work to be done."""
        self.hurried.set()
