"""Where processes meet: a socket file for this machine, HOST:PORT with TLS between machines; opens no connection.

An address is a Path (a unix socket) or a text HOST:PORT. Anything but this machine itself needs TLS and a key.
"""

import hashlib
import ipaddress
import os
import ssl
import stat
from pathlib import Path

from smelt.errors import ConfigError, TransportError

Address = Path | str

MAX_SOCKET_PATH_BYTES = 103  # what fits into sun_path with its final zero: 108 bytes on Linux, 104 on macOS


def socket_path(home: Path, runtime_dir: Path | None = None) -> Path:
    """The socket file of a home folder, in a folder of this user's that is made with mode 0700.

    A path below `home` could be longer than a socket's may be. `runtime_dir` is the user's folder for such files,
    $XDG_RUNTIME_DIR, where there is one; without it, or where that path too is long, the socket lies in
    /tmp/smelt-UID. TransportError where that folder belongs to somebody else.
    """
    name = hashlib.sha256(os.fsencode(home.resolve())).hexdigest()[:16] + ".sock"
    folder = Path(f"/tmp/smelt-{os.getuid()}")
    if runtime_dir is not None and len(os.fsencode(runtime_dir / "smelt" / name)) <= MAX_SOCKET_PATH_BYTES:
        folder = runtime_dir / "smelt"
    _make_private(folder)
    return folder / name


def _make_private(folder: Path) -> None:
    """Anybody may make a folder in /tmp first, so what is there already is looked at, and never through a link."""
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise TransportError(f"{folder} is not a folder of this user's: remove it, or set XDG_RUNTIME_DIR")
    if stat.S_IMODE(found.st_mode) != 0o700:
        folder.chmod(0o700)


def host_and_port(address: str) -> tuple[str, int]:
    """The two parts of HOST:PORT; an IPv6 host stands in brackets. ConfigError for anything else."""
    host, _, port = address.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ConfigError(f"{address!r} is no HOST:PORT: an IPv6 host stands in brackets, as in [::1]:8001")
    if not host or not (port.isascii() and port.isdigit()) or int(port) > 65535:
        raise ConfigError(f"{address!r} is no HOST:PORT, such as 127.0.0.1:8001")
    return host, int(port)


def is_local(address: Address) -> bool:
    """Whether only this machine can reach it."""
    return isinstance(address, Path) or is_loopback(host_and_port(address)[0])


def is_loopback(host: str) -> bool:
    """Whether a host is this machine itself. One by name may be anywhere, except localhost."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_exposure(address: Address, key: bytes | None, tls: ssl.SSLContext | None) -> None:
    """ConfigError for an address that other machines reach without TLS and a key."""
    if not is_local(address) and (key is None or tls is None):
        raise ConfigError(f"{address} is not of this machine alone: it needs a key and a TLS certificate")


def server_tls(certificate: Path, private_key: Path) -> ssl.SSLContext:
    """TLS for `listen`: the certificate that is shown and its private key, as PEM files."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    try:
        context.load_cert_chain(certificate, private_key)
    except OSError as error:
        raise ConfigError(
            f"cannot use the TLS certificate {certificate} with the key {private_key}: {error}"
        ) from error
    return context


def client_tls(certificate: Path) -> ssl.SSLContext:
    """TLS for `connect`: trusts this certificate (a self-signed one, or the authority's) and no other, as a PEM file.

    The certificate must name the host that is dialled.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    try:
        context.load_verify_locations(certificate)
    except OSError as error:
        raise ConfigError(f"cannot use the TLS certificate {certificate}: {error}") from error
    return context
