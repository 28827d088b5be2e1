"""A process that never outlives the one that started it, whatever kills that; knows no work and no torch.

    python -m smelt.cluster.lifeline DESCRIPTOR MODULE [ARGUMENT ...]

runs a module as `python -m` would, in this same process. DESCRIPTOR is the reading end of a pipe whose other end only
the starter holds: the kernel closes it when the starter dies. A process that leads its group takes the whole group
with it, so that what it has started itself (a forkserver that is busy importing) does not stay behind either.
"""

import os
import runpy
import select
import signal
import sys
import threading

if sys.platform == "linux":
    import fcntl


def start_command(descriptor: int, module: str, *arguments: str) -> list[str]:
    """The command that starts a module on a lifeline, which must be passed on to it."""
    return [sys.executable, "-m", __spec__.name, str(descriptor), module, *arguments]


def die_at_end_of_file(descriptor: int) -> None:
    """End this process, or the group that it leads, when the other end of a pipe is closed.

    A thread watches the pipe. On Linux the kernel itself sends the signal, so that it comes even to a process that is
    stuck. The parent-death signal (PR_SET_PDEATHSIG) would reach this process alone, and leave no time for others.
    """
    os.set_inheritable(descriptor, False)
    if sys.platform == "linux":
        fcntl.fcntl(descriptor, fcntl.F_SETOWN, -os.getpid() if _leads_group() else os.getpid())
        fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) | os.O_ASYNC)
    threading.Thread(target=_watch, args=(descriptor,), name="lifeline", daemon=True).start()


def _watch(descriptor: int) -> None:
    poll = select.poll()
    poll.register(descriptor, 0)  # the end is always told
    poll.poll()
    if _leads_group():
        os.killpg(0, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def _leads_group() -> bool:
    return os.getpgrp() == os.getpid()


def main() -> None:
    """Bind this process to the starter's life, then become the module."""
    descriptor, module, *arguments = sys.argv[1:]
    die_at_end_of_file(int(descriptor))
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
