"""A process that never outlives the one that started it, whatever kills that; knows no work and no torch.

    python -m smelt.cluster.lifeline PARENT DESCRIPTOR MODULE [ARGUMENT ...]

runs a module as `python -m` would, in this same process. PARENT is the starter's pid, DESCRIPTOR the reading end of a
pipe whose other end only the starter holds. On Linux the kernel ends us together with it, even while the interpreter
is stuck in a long call; the pipe does so on other systems, and for whoever is not the starter's own child.
"""

import ctypes
import os
import runpy
import signal
import sys
import threading

PR_SET_PDEATHSIG = 1


def start_command(descriptor: int, module: str, *arguments: str) -> list[str]:
    """The command that starts a module bound to this process's life; `descriptor` must be passed on to it."""
    return [sys.executable, "-m", __spec__.name, str(os.getpid()), str(descriptor), module, *arguments]


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent, which must be that one, is gone."""
    if sys.platform != "linux":
        return
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"prctl(PR_SET_PDEATHSIG): {os.strerror(error)}")
    # It may have died before we asked.
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def die_at_end_of_file(descriptor: int) -> None:
    """Kill this process when the other end of a pipe is closed, as it is when its only holder dies."""
    os.set_inheritable(descriptor, False)

    def watch() -> None:
        while os.read(descriptor, 1):
            pass
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="lifeline", daemon=True).start()


def main() -> None:
    """Bind this process to the starter's life, then become the module."""
    parent, descriptor, module, *arguments = sys.argv[1:]
    die_with_parent(int(parent))
    die_at_end_of_file(int(descriptor))
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
