"""How much one caller, and all together, may ask: requests per minute and at once; knows no HTTP beyond header names.

Counted in this process's memory by a monotonic clock. A restart forgives what was asked in the last minute.
"""

import math
import time
from collections import deque
from collections.abc import Callable

from smelt.control.keys import Caller
from smelt.errors import RateLimited, Unavailable

MINUTE_S = 60.0
# Requests at once, of everybody: long polls and streams mostly wait, but each holds memory and a connection.
MAX_IN_FLIGHT = 8192

Clock = Callable[[], float]
Headers = list[tuple[bytes, bytes]]


class Window:
    """At most `limit` in any minute. Exact, for the price of a number per request of that minute."""

    __slots__ = ("_clock", "_times", "limit")

    def __init__(self, limit: int, clock: Clock = time.monotonic) -> None:
        self.limit = limit
        self._clock = clock
        self._times: deque[float] = deque()

    def take(self) -> bool:
        """Count one more, if there is room."""
        if self.num_left == 0:
            return False
        self._times.append(self._clock())
        return True

    @property
    def num_left(self) -> int:
        """How many more there is room for now."""
        long_ago = self._clock() - MINUTE_S
        while self._times and self._times[0] <= long_ago:
            self._times.popleft()
        return self.limit - len(self._times)

    @property
    def seconds_to_next(self) -> float:
        """How long until there is room for one more."""
        return self._times[0] + MINUTE_S - self._clock() if self.num_left == 0 else 0.0

    @property
    def seconds_to_all(self) -> float:
        """How long until nothing counts any more."""
        return max(0.0, self._times[-1] + MINUTE_S - self._clock()) if self._times else 0.0


class Allowance:
    """What one key may ask, and how much of it is in use."""

    __slots__ = ("_max_concurrent", "_window", "num_running")

    def __init__(self, per_minute: int | None, max_concurrent: int | None, clock: Clock) -> None:
        self._window = None if per_minute is None else Window(per_minute, clock)
        self._max_concurrent = max_concurrent
        self.num_running = 0

    def enter(self) -> None:
        """Count a request, which has to `leave` later. RateLimited: it was not counted."""
        if self._max_concurrent is not None and self.num_running >= self._max_concurrent:
            raise RateLimited(f"this key may have {self._max_concurrent} requests at once; wait for one to end")
        if self._window is not None and not self._window.take():
            wait_s = math.ceil(self._window.seconds_to_next)
            limit = self._window.limit
            raise RateLimited(f"this key may make {limit} requests per minute; try again in {wait_s} s", wait_s)
        self.num_running += 1

    def leave(self) -> None:
        """A request that had entered has ended."""
        self.num_running -= 1

    def headers(self) -> Headers:
        """Where the caller stands, under the names that OpenAI's clients know."""
        if self._window is None:
            return []
        return [
            (b"x-ratelimit-limit-requests", b"%d" % self._window.limit),
            (b"x-ratelimit-remaining-requests", b"%d" % self._window.num_left),
            (b"x-ratelimit-reset-requests", b"%.2fs" % self._window.seconds_to_all),
        ]


class Limits:
    """The allowances of all keys, and how many requests are under way."""

    def __init__(self, max_in_flight: int = MAX_IN_FLIGHT, clock: Clock = time.monotonic) -> None:
        self._max_in_flight = max_in_flight
        self._clock = clock
        self._allowances: dict[str, Allowance] = {}
        self.num_in_flight = 0

    def allowance(self, caller: Caller) -> Allowance | None:
        """What the caller may ask; None where nothing is limited."""
        if caller.key_id is None or (caller.requests_per_minute is None and caller.max_concurrent is None):
            return None
        found = self._allowances.get(caller.key_id)
        if found is None:
            found = Allowance(caller.requests_per_minute, caller.max_concurrent, self._clock)
            self._allowances[caller.key_id] = found
        return found

    def enter(self) -> None:
        """Count a request, which has to `leave` later. Unavailable: there are too many, and it was not counted."""
        if self.num_in_flight >= self._max_in_flight:
            raise Unavailable(f"this server has {self.num_in_flight} requests in hand and takes no more for the moment")
        self.num_in_flight += 1

    def leave(self) -> None:
        """A request that had entered has ended."""
        self.num_in_flight -= 1
