"""Places where a process can be made to die, so that every crash point has a test; knows nothing of what it cuts.

A fault is `POINT:NTH`: the process kills itself, as `kill -9` would, when it comes to that point for the NTH time. With
a place for a note it does so once, however often it is started again.
"""

import os
import signal
from collections.abc import Callable
from pathlib import Path

from smelt.errors import ConfigError

# point -> what is on the disk when the process dies there. Of whoever works with the ledger:
LEDGER_POINTS = {
    "before_insert": "nothing of the request, except a large body",
    "after_insert_before_commit": "nothing of the request: its transaction is open",
    "after_commit_before_answer": "the request, though its sender was never told",
    "after_grant_before_send": "the request, granted to a worker that never heard of it",
    "before_result_commit": "the request, granted, without its result",
    "after_result_commit": "the result, though its worker was never told",
    "mid_file_write": "half of a body under a temporary name",
    "between_rename_and_fsync": "a body under its final name in a folder that is not yet on the disk",
}
# Of the API, where it keeps sessions' logs:
LOG_POINTS = {
    "after_log_forgotten": "no log behind a snapshot, and older snapshots whose worker was never told to remove them",
}
# Of a worker that keeps sessions:
SESSION_POINTS = {
    "before_operation": "the operation, granted; nothing of it was computed",
    "after_operation": "the same: it was computed, and its result is lost",
    "after_result_sent": "the same, or its result",
    "mid_snapshot": "a snapshot under a temporary name",
    "after_snapshot": "a snapshot that nobody was told of",
    "before_old_snapshots_go": "snapshots that nobody needs",
    "mid_save": "weights under a temporary name",
    "after_save": "weights that nobody was told of",
}
POINTS = LEDGER_POINTS | LOG_POINTS | SESSION_POINTS

Fault = Callable[[str], None]


def no_fault(point: str) -> None:
    """The fault of every ordinary process: none."""
    assert point in POINTS


def fault_from(spec: str | None, note: Path | None = None) -> Fault:
    """What to call at each point; `spec` is `POINT:NTH`, or None for no fault. ConfigError where it is neither.

    `note` is written before the death, and where it is there already nobody dies.
    """
    if spec is None or (note is not None and note.exists()):
        return no_fault
    wanted, _, nth = spec.partition(":")
    if wanted not in POINTS or not nth.isdecimal() or int(nth) < 1:
        raise ConfigError(f"fault {spec!r} is not POINT:NTH with NTH from 1 and POINT one of {', '.join(POINTS)}")
    num_left = int(nth)

    def die_there(point: str) -> None:
        nonlocal num_left
        assert point in POINTS
        num_left -= point == wanted
        if point == wanted and num_left == 0:
            if note is not None:
                note.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    return die_there
