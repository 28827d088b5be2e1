"""Places where a process can be made to die, so that every crash point has a test; knows nothing of what it cuts.

A fault is `POINT:NTH`: the process kills itself, as `kill -9` would, when it comes to that point for the NTH time.
"""

import os
import signal
from collections.abc import Callable

from smelt.errors import ConfigError

# point -> what is on the disk when the process dies there.
POINTS = {
    "before_insert": "nothing of the request, except a large body",
    "after_insert_before_commit": "nothing of the request: its transaction is open",
    "after_commit_before_answer": "the request, though its sender was never told",
    "before_result_commit": "the request, granted, without its result",
    "after_result_commit": "the result, though its worker was never told",
    "mid_file_write": "half of a body under a temporary name",
    "between_rename_and_fsync": "a body under its final name in a folder that is not yet on the disk",
}

Fault = Callable[[str], None]


def no_fault(point: str) -> None:
    """The fault of every ordinary process: none."""
    assert point in POINTS


def fault_from(spec: str | None) -> Fault:
    """What to call at each point; `spec` is `POINT:NTH`, or None for no fault. ConfigError where it is neither."""
    if spec is None:
        return no_fault
    wanted, _, nth = spec.partition(":")
    if wanted not in POINTS or not nth.isdecimal() or int(nth) < 1:
        raise ConfigError(f"fault {spec!r} is not POINT:NTH with NTH from 1 and POINT one of {', '.join(POINTS)}")
    num_left = int(nth)

    def die_there(point: str) -> None:
        nonlocal num_left
        assert point in POINTS
        num_left -= point == wanted
        if num_left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    return die_there
