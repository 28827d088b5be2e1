"""The key that both ends of a connection between machines know, kept in a file; knows no connection.

The file holds text, so that it can be copied by hand, and only its owner may read it.
"""

import secrets
from pathlib import Path

from smelt.disk import write_once
from smelt.errors import ConfigError
from smelt.transport.handshake import check_key


def read_key(path: Path) -> bytes:
    """The key in a file. ConfigError where there is none, or a guessable one."""
    try:
        key = path.read_bytes().strip()
    except OSError as error:
        raise ConfigError(
            f"cannot read the worker key {path} ({error.strerror}); copy the server's worker.key there"
        ) from None
    check_key(key)
    return key


def make_key(path: Path) -> bytes:
    """The key in a file, which is made if it is not there."""
    try:
        write_once(path, f"{secrets.token_hex(32)}\n".encode())
    except OSError as error:
        raise ConfigError(f"cannot make the worker key {path}: {error.strerror}") from None
    return read_key(path)
