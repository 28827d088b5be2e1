"""Nobody outlives who started them, not even what they have started; and a module runs as `python -m` would."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from processes import eventually, is_alive, needs_proc
from smelt.cluster.lifeline import start_command

STARTER = """
import os, signal, subprocess
from smelt.cluster.lifeline import start_command
lifeline, held = os.pipe()
child = subprocess.Popen(start_command(lifeline, "parent_of_another"), pass_fds=[lifeline], process_group=0)
signal.pause()
"""
PARENT_OF_ANOTHER = """
import os
os.fork()
os.write(1, f"{os.getpid()}\\n".encode())
while True:
    pass  # busy, as somebody who imports is
"""
PIPE_HOLDER = """
import os, signal, sys
from smelt.cluster.lifeline import die_at_end_of_file
die_at_end_of_file(int(sys.argv[1]))
print("bound", flush=True)
while True:
    signal.pause()
"""


@needs_proc
def test_a_process_dies_with_its_starter_and_takes_its_children_along(tmp_path: Path) -> None:
    (tmp_path / "parent_of_another.py").write_text(PARENT_OF_ANOTHER)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    with subprocess.Popen(
        [sys.executable, "-c", STARTER], stdout=subprocess.PIPE, text=True, env=environment
    ) as starter:
        assert starter.stdout is not None
        pids = [int(starter.stdout.readline()), int(starter.stdout.readline())]
        assert all(map(is_alive, pids))
        starter.kill()
    eventually(lambda: not any(map(is_alive, pids)), "the death of both", 5)


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


def test_who_comes_too_late_dies_at_once() -> None:
    lifeline, held = os.pipe()
    os.close(held)
    command = [sys.executable, "-c", PIPE_HOLDER, str(lifeline)]
    done = subprocess.run(command, pass_fds=[lifeline], capture_output=True, timeout=10, check=False)
    os.close(lifeline)
    assert done.returncode == -signal.SIGKILL


def test_a_module_has_its_arguments_and_its_exit_code() -> None:
    lifeline, held = os.pipe()
    command = start_command(lifeline, "smelt", "generate")
    done = subprocess.run(command, pass_fds=[lifeline], capture_output=True, text=True, check=False)
    os.close(lifeline)
    os.close(held)
    assert done.returncode == 2
    assert done.stderr == "error: Missing argument 'MODEL'. (see smelt generate --help)\n"
