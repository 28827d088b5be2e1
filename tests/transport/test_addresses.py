"""Socket files are private and their paths short; whatever other machines reach needs TLS and a key."""

import os
import stat
from pathlib import Path

import pytest

from smelt.errors import ConfigError, TransportError
from smelt.transport import addresses
from smelt.transport.addresses import check_exposure, client_tls, host_and_port, is_local, server_tls, socket_path

KEY = bytes(32)


@pytest.fixture
def runtime_dir(short_folder: Path) -> Path:
    return short_folder


def mode_of(folder: Path) -> int:
    return stat.S_IMODE(folder.stat().st_mode)


def test_the_folder_of_sockets_is_private(runtime_dir: Path, tmp_path: Path) -> None:
    path = socket_path(tmp_path, runtime_dir)
    assert path.parent == runtime_dir / "smelt"
    assert mode_of(path.parent) == 0o700


def test_a_folder_that_others_may_read_is_made_private(runtime_dir: Path, tmp_path: Path) -> None:
    folder = runtime_dir / "smelt"
    folder.mkdir()
    folder.chmod(0o755)
    assert mode_of(socket_path(tmp_path, runtime_dir).parent) == 0o700


def test_without_a_runtime_folder_it_is_one_in_tmp_named_by_user(tmp_path: Path) -> None:
    folder = socket_path(tmp_path).parent
    assert folder == Path(f"/tmp/smelt-{os.getuid()}")
    assert mode_of(folder) == 0o700


def test_each_home_has_a_socket_of_its_own(runtime_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "a")
    first = socket_path(tmp_path / "a", runtime_dir)
    assert first == socket_path(tmp_path / "link", runtime_dir)
    assert first != socket_path(tmp_path / "b", runtime_dir)


def test_a_long_home_has_a_short_socket(runtime_dir: Path) -> None:
    assert len(os.fsencode(socket_path(Path("/") / ("long" * 50), runtime_dir))) <= addresses.MAX_SOCKET_PATH_BYTES


def test_a_long_runtime_folder_is_not_used(tmp_path: Path) -> None:
    assert socket_path(tmp_path, tmp_path / ("long" * 25)).parent == Path(f"/tmp/smelt-{os.getuid()}")


def test_a_link_in_the_place_of_the_folder_is_refused(runtime_dir: Path, tmp_path: Path) -> None:
    (runtime_dir / "smelt").symlink_to(tmp_path)
    with pytest.raises(TransportError, match="is not a folder of this user's"):
        socket_path(tmp_path, runtime_dir)


def test_a_folder_of_somebody_else_is_refused(
    runtime_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(addresses.os, "getuid", lambda: 4_000_000)
    with pytest.raises(TransportError, match="is not a folder of this user's"):
        socket_path(tmp_path, runtime_dir)


@pytest.mark.parametrize(
    ("address", "parts"),
    [("127.0.0.1:8001", ("127.0.0.1", 8001)), ("[::1]:0", ("::1", 0)), ("gpu-1.lan:65535", ("gpu-1.lan", 65535))],
)
def test_host_and_port(address: str, parts: tuple[str, int]) -> None:
    assert host_and_port(address) == parts


@pytest.mark.parametrize(
    "address", ["", "8001", ":8001", "host", "host:", "host:port", "host:-1", "host:65536", "::1:80"]
)
def test_what_is_no_host_and_port_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="is no HOST:PORT"):
        host_and_port(address)


@pytest.mark.parametrize("address", [Path("/run/a.sock"), "127.0.0.1:1", "127.9.9.9:1", "[::1]:1", "localhost:1"])
def test_addresses_of_this_machine_need_no_key(address: Path | str) -> None:
    assert is_local(address)
    check_exposure(address, None, None)


@pytest.mark.parametrize("address", ["0.0.0.0:1", "[::]:1", "192.168.0.5:1", "gpu-1:1", "localhost.evil.com:1"])
@pytest.mark.parametrize("key", [None, KEY])
def test_addresses_beyond_this_machine_need_tls_and_a_key(address: str, key: bytes | None) -> None:
    assert not is_local(address)
    with pytest.raises(ConfigError, match="needs a key and a TLS certificate"):
        check_exposure(address, key, None)


def test_files_that_hold_no_certificate_are_named(tmp_path: Path) -> None:
    empty = tmp_path / "empty.pem"
    empty.touch()
    with pytest.raises(ConfigError, match=r"empty\.pem"):
        client_tls(empty)
    with pytest.raises(ConfigError, match=r"absent\.pem"):
        server_tls(tmp_path / "absent.pem", empty)
