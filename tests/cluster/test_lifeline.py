"""Nobody outlives who started them, by the kernel's signal and by the pipe; and a module runs as `python -m` would."""

import os
import signal
import subprocess
import sys

import pytest

from processes import eventually, is_alive, needs_proc
from smelt.cluster.lifeline import start_command

STARTER = """
import os, signal, subprocess
from smelt.cluster.lifeline import start_command
lifeline, held = os.pipe()
child = subprocess.Popen(start_command(lifeline, "http.server", "--bind", "127.0.0.1", "0"), pass_fds=[lifeline],
                         stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
print(child.pid, flush=True)
signal.pause()
"""
PIPE_HOLDER = """
import os, signal, sys
from smelt.cluster.lifeline import die_at_end_of_file
die_at_end_of_file(int(sys.argv[1]))
print("bound", flush=True)
while True:
    signal.pause()
"""
ORPHAN = "import os; from smelt.cluster.lifeline import die_with_parent; die_with_parent(os.getpid()); print('lives')"


@needs_proc
def test_a_process_dies_with_its_starter() -> None:
    starter = subprocess.Popen([sys.executable, "-c", STARTER], stdout=subprocess.PIPE, text=True)
    assert starter.stdout is not None
    pid = int(starter.stdout.readline())
    assert is_alive(pid)
    starter.kill()
    starter.communicate()
    eventually(lambda: not is_alive(pid), "the death of the child", 5)


def test_the_end_of_the_pipe_is_the_end_of_who_reads_it() -> None:
    lifeline, held = os.pipe()
    command = [sys.executable, "-c", PIPE_HOLDER, str(lifeline)]
    bound = subprocess.Popen(command, pass_fds=[lifeline], stdout=subprocess.PIPE, text=True)
    os.close(lifeline)
    assert bound.stdout is not None
    assert bound.stdout.readline() == "bound\n"
    assert bound.poll() is None
    os.close(held)
    bound.communicate(timeout=10)
    assert bound.returncode == -signal.SIGKILL


@pytest.mark.skipif(sys.platform != "linux", reason="not on this platform")
def test_who_comes_too_late_to_ask_for_it_dies_at_once() -> None:
    done = subprocess.run([sys.executable, "-c", ORPHAN], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, "")


def test_a_module_has_its_arguments_and_its_exit_code() -> None:
    lifeline, held = os.pipe()
    command = start_command(lifeline, "smelt", "generate")
    done = subprocess.run(command, pass_fds=[lifeline], capture_output=True, text=True, check=False)
    os.close(lifeline)
    os.close(held)
    assert done.returncode == 2
    assert done.stderr == "error: Missing argument 'MODEL'. (see smelt generate --help)\n"
