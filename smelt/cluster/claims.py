"""What a server has for itself alone while it lives: its home folder and a listening socket; knows no processes."""

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from errno import EADDRINUSE
from pathlib import Path
from typing import TextIO

from smelt.errors import ConfigError

LOCK_FILE = ".lock"
LOCK_SECONDS = 0.2  # somebody may be looking whether a server runs
BACKLOG = 2048
BIND_SECONDS = 2.0  # the processes of a server that was killed may need a moment to die


@contextmanager
def held_home(home: Path) -> Iterator[None]:
    """Hold a home folder while the block runs, or this process lives. ConfigError names who else holds it."""
    try:
        home.mkdir(parents=True, exist_ok=True)
        file = (home / LOCK_FILE).open("a+")
    except OSError as error:
        raise ConfigError(f"cannot use {home} as home folder: {error.strerror}") from None
    with file:
        if not _locked(file):
            file.seek(0)
            holder = file.read().split()
            who = f"process {holder[0]}" if holder else "another process"
            raise ConfigError(f"{who} serves {home} already; stop it, or choose another SMELT_HOME")
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)  # so that nobody is named who is no longer there


def _locked(file: TextIO) -> bool:
    until = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > until:
                return False
            time.sleep(0.01)
        else:
            return True


def note_address(home: Path, url: str) -> None:
    """Let commands of this home folder find the server that holds it."""
    with (home / LOCK_FILE).open("a") as file:
        file.write(f"{url}\n")


def server_url(home: Path) -> str | None:
    """Where the server of a home folder is; None where none runs, or it does not listen yet."""
    try:
        file = (home / LOCK_FILE).open()
    except FileNotFoundError:
        return None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:  # somebody holds it, for as long as it lives
            words = file.read().split()
            return words[1] if len(words) > 1 else None
        return None


def listening_socket(host: str, port: int) -> socket.socket:
    """A socket that takes connections from now on; whoever accepts them comes later.

    ConfigError where the port is taken, or the host is not this machine's.
    """
    until = time.monotonic() + BIND_SECONDS
    while True:
        try:
            return _bound(host, port)
        except OSError as error:
            if error.errno != EADDRINUSE:
                raise ConfigError(f"cannot listen at {host}:{port}: {error.strerror}") from None
            if time.monotonic() > until:
                raise ConfigError(f"port {port} of {host} is taken; choose another: --port 8001") from None
        time.sleep(0.05)


def is_taken(host: str, port: int) -> bool:
    """Whether somebody listens there already."""
    try:
        _bound(host, port).close()
    except OSError as error:
        return error.errno == EADDRINUSE
    return False


def base_url(listener: socket.socket) -> str:
    """How a client on this machine reaches the socket."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _bound(host: str, port: int) -> socket.socket:
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, protocol)
    try:
        # Connections of an earlier server may still be closing; a server that lives keeps the port all the same.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener
