"""One server per home folder and port: the second one is told who has them."""

import os
import socket
from pathlib import Path

import pytest

from smelt.cluster.claims import LOCK_FILE, base_url, held_home, is_taken, listening_socket, note_address, server_url
from smelt.errors import ConfigError


def test_a_home_folder_is_held_by_one_and_named_so(tmp_path: Path) -> None:
    home = tmp_path / "new" / "home"
    with held_home(home):
        refused = pytest.raises(ConfigError, match=f"process {os.getpid()} serves {home} already")
        with refused, held_home(home):
            pass
    assert (home / LOCK_FILE).read_text() == ""
    with held_home(home):
        assert (home / LOCK_FILE).read_text() == f"{os.getpid()}\n"


def test_the_server_of_a_home_folder_is_found_while_it_lives(tmp_path: Path) -> None:
    assert server_url(tmp_path) is None
    with held_home(tmp_path):
        assert server_url(tmp_path) is None
        note_address(tmp_path, "http://127.0.0.1:8000")
        assert server_url(tmp_path) == "http://127.0.0.1:8000"
        refused = pytest.raises(ConfigError, match=f"process {os.getpid()} serves {tmp_path} already")
        with refused, held_home(tmp_path):
            pass
    assert server_url(tmp_path) is None
    (tmp_path / LOCK_FILE).write_text("1\nhttp://127.0.0.1:8000\n")  # of one that was killed
    assert server_url(tmp_path) is None


def test_a_home_folder_that_cannot_be_one_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ConfigError, match="file/home as home folder: Not a directory"),
        held_home(tmp_path / "file/home"),
    ):
        pass


def test_a_port_is_taken_by_who_listens_and_free_afterwards() -> None:
    with listening_socket("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        assert is_taken("127.0.0.1", port)
        with pytest.raises(ConfigError, match=f"port {port} of 127.0.0.1 is taken; choose another"):
            listening_socket("127.0.0.1", port)
    assert not is_taken("127.0.0.1", port)
    listening_socket("127.0.0.1", port).close()


def test_connections_wait_until_somebody_accepts_them() -> None:
    with listening_socket("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()) as client:
        client.sendall(b"hello")
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.recv(10) == b"hello"


def test_a_host_of_another_machine_is_refused() -> None:
    with pytest.raises(ConfigError, match="cannot listen at 192.0.2.1:8000"):
        listening_socket("192.0.2.1", 8000)


def test_a_host_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="cannot listen at no-such-host:8000"):
        listening_socket("no-such-host", 8000)


@pytest.mark.parametrize(("host", "shown"), [("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "127.0.0.1"), ("::1", "[::1]")])
def test_a_client_of_this_machine_is_told_where(host: str, shown: str) -> None:
    if ":" in host and not socket.has_dualstack_ipv6():
        pytest.skip("not on this platform: no IPv6")
    with listening_socket(host, 0) as listener:
        assert base_url(listener) == f"http://{shown}:{listener.getsockname()[1]}"
