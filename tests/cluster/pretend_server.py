"""A supervisor over pretended programs, as a process: `python pretend_server.py supervise WORKER`, a role below.

Prints its port when the API answers.
"""

import asyncio
import logging
import os
import signal
import socket
import sys
import time
from pathlib import Path

from smelt.cluster.children import Program
from smelt.cluster.claims import listening_socket
from smelt.cluster.supervisor import Supervisor


def api(descriptor: str) -> None:
    """Answer every connection; SIGTERM lets the one at hand finish."""
    listener = socket.socket(fileno=int(descriptor))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    while True:
        connection, _ = listener.accept()
        if b"slow" in connection.recv(1000):
            answer_until_told(connection)
        connection.sendall(f"answered by {os.getpid()}\n".encode())
        connection.close()


def answer_until_told(connection: socket.socket) -> None:
    told = []
    signal.signal(signal.SIGTERM, lambda *_: told.append(True))
    connection.sendall(b"begun\n")
    while not told:
        time.sleep(0.01)
    connection.sendall(b"finished\n")
    connection.close()
    sys.exit(0)


def good() -> None:
    """Do nothing, beside a child that would outlive it."""
    os.fork()
    while True:
        signal.pause()


def deaf() -> None:
    """Do nothing, and listen to no SIGTERM."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while True:
        signal.pause()


def broken() -> None:
    """Say something and die."""
    sys.stderr.write("I have no hands\n")
    sys.exit(1)


def hopeless() -> None:
    """A mistake that another start would repeat."""
    sys.stderr.write("error: there is no such device\n")
    sys.exit(2)


async def supervise(worker: str) -> int:
    with listening_socket("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        programs = [
            Program("api", "pretend_server", ("api", str(listener.fileno())), (listener.fileno(),)),
            Program("worker", "pretend_server", (worker,)),
        ]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
        return await Supervisor(programs, listener, environment).run(lambda: print(port, flush=True))


ROLES = {"api": api, "good": good, "deaf": deaf, "broken": broken, "hopeless": hopeless}

if __name__ == "__main__":
    if sys.argv[1] == "supervise":
        logging.basicConfig(format="%(message)s")
        sys.exit(asyncio.run(supervise(sys.argv[2])))
    ROLES[sys.argv[1]](*sys.argv[2:])
