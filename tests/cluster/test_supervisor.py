"""Programs are kept alive, and ended in order, whoever kills whom; pretended ones, in real processes."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from processes import all_below, children_of, eventually, is_alive, needs_proc
from smelt.cluster.children import PAUSES, Deaths, manner_of_death

pytestmark = [needs_proc, pytest.mark.timeout(60)]

PRETENDED = Path(__file__).with_name("pretend_server.py")

Server = subprocess.Popen[str]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[str], Server]]:
    """Starts a supervisor with a worker of that kind; all that is left at the end is killed."""
    servers: list[Server] = []

    def start_with(worker: str) -> Server:
        servers.append(
            subprocess.Popen(
                [sys.executable, str(PRETENDED), "supervise", worker],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
        return servers[-1]

    yield start_with
    for server in servers:
        server.kill()
        server.communicate()


def port_of(server: Server) -> int:
    """Its port, when its API answers."""
    assert server.stdout is not None
    return int(server.stdout.readline())


def child(server: Server, role: str) -> int:
    """The pid of the child with that role."""

    def look() -> int | None:
        return next((pid for pid, command in children_of(server.pid).items() if f" {role}" in command), None)

    found = eventually(look, f"the start of the {role}")
    assert found is not None
    return found


def ask(port: int, question: bytes = b"quick") -> str:
    """What the API says."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(question)
        return connection.makefile().read()


def end(server: Server) -> tuple[int, str]:
    """Its exit code and its log, after SIGTERM."""
    server.terminate()
    _, log = server.communicate(timeout=20)
    return server.returncode, log


def test_both_programs_run_and_sigterm_ends_them(start: Callable[[str], Server]) -> None:
    server = start("good")
    assert ask(port_of(server)) == f"answered by {child(server, 'api')}\n"
    eventually(lambda: len(all_below(server.pid)) == 3, "the worker's own child")
    below = all_below(server.pid)
    assert end(server) == (0, "")
    assert not [pid for pid in below if is_alive(pid)]


@pytest.mark.parametrize("role", ["api", "good"])
def test_a_killed_program_comes_back(start: Callable[[str], Server], role: str) -> None:
    server = start("good")
    port = port_of(server)
    killed = child(server, role)
    eventually(lambda: role == "api" or all_below(killed), "the worker's own child")
    below = all_below(killed)
    os.kill(killed, signal.SIGKILL)
    eventually(lambda: not is_alive(killed), "its death")
    answer = ask(port)  # it waited in the backlog, where it was the API
    eventually(lambda: child(server, role) != killed, "the next one")
    assert answer == f"answered by {child(server, 'api')}\n"
    assert not [pid for pid in below if is_alive(pid)], "what it had started must be gone before the next start"
    code, log = end(server)
    name = {"good": "worker"}.get(role, role)
    assert (code, log) == (0, f"the {name} (pid {killed}) was killed by SIGKILL; starting it again\n")


def test_a_killed_supervisor_leaves_nobody(start: Callable[[str], Server]) -> None:
    server = start("deaf")
    port_of(server)
    child(server, "deaf")
    direct = set(children_of(server.pid))
    server.kill()
    server.communicate()
    eventually(lambda: not [pid for pid in direct if is_alive(pid)], "the end of all children", 5)


def test_an_answer_at_hand_is_finished_and_no_new_one_is_begun(start: Callable[[str], Server]) -> None:
    server = start("good")
    port = port_of(server)
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(b"slow")
        lines = connection.makefile()
        assert lines.readline() == "begun\n"
        server.terminate()
        assert lines.readline() == "finished\n"
    server.communicate(timeout=20)
    assert server.returncode == 0
    with pytest.raises(ConnectionRefusedError):
        ask(port)


def test_a_deaf_program_is_killed(start: Callable[[str], Server]) -> None:
    server = start("deaf")
    port_of(server)
    deaf = child(server, "deaf")
    eventually(lambda: int_of_mask(deaf) & 1 << signal.SIGTERM - 1, "its deafness")
    code, log = end(server)
    assert (code, log) == (0, "the worker does not end; killing it\n")
    assert not is_alive(deaf)


def int_of_mask(pid: int) -> int:
    """The signals that it ignores, as bits."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("SigIgn")), 16)


def test_a_second_signal_waits_for_nobody(start: Callable[[str], Server]) -> None:
    server = start("good")
    with socket.create_connection(("127.0.0.1", port_of(server))) as connection:
        os.kill(child(server, "api"), signal.SIGSTOP)  # it would take its half minute
        connection.sendall(b"slow")
        num_open = num_sockets(server)
        began = time.monotonic()
        server.send_signal(signal.SIGINT)
        eventually(lambda: num_sockets(server) < num_open, "the closed door")
        server.send_signal(signal.SIGINT)
        server.communicate(timeout=20)
    assert server.returncode == 0
    assert time.monotonic() - began < 10


def num_sockets(server: Server) -> int:
    """How many the supervisor itself holds."""
    folder = Path(f"/proc/{server.pid}/fd")
    return sum(os.readlink(path).startswith("socket:") for path in folder.iterdir())


def test_a_program_that_dies_again_and_again_is_quoted_and_waited_for(start: Callable[[str], Server]) -> None:
    server = start("broken")
    assert server.stderr is not None
    lines = []
    while not lines or "next try" not in lines[-1]:
        lines.append(server.stderr.readline())
    assert [line for line in lines if line == "I have no hands\n"] == ["I have no hands\n"] * 3
    assert "ended with exit code 1: death 3 within a minute; next try in 0.1 s" in lines[-1]
    assert server.stderr.readline() == "I have no hands\n"
    assert end(server)[0] == 0


def test_a_mistake_that_would_repeat_ends_the_server(start: Callable[[str], Server]) -> None:
    server = start("hopeless")
    _, log = server.communicate(timeout=20)
    assert server.returncode == 2
    assert log == "error: there is no such device\nthe worker cannot run, for the reason above: stopping\n"


def test_pauses_grow_with_the_deaths_of_the_last_minute() -> None:
    deaths = Deaths()
    pauses = []
    for second in range(12):
        deaths.note(second)
        pauses.append(deaths.pause)
    assert pauses == [*PAUSES[1:], 10.0, 10.0]
    assert (deaths.note(100.0), deaths.pause) == (1, 0.1)


@pytest.mark.parametrize(
    ("code", "words"),
    [(0, "ended with exit code 0"), (-9, "was killed by SIGKILL"), (-999, "was killed by signal 999")],
)
def test_deaths_have_words(code: int, words: str) -> None:
    assert manner_of_death(code) == words
