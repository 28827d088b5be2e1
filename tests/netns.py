"""Hosts simulated on this machine: a network namespace each, joined by a cable; needs root and Linux's `ip`."""

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

INTERFACE = "wire"


@dataclass(frozen=True)
class Host:
    """A namespace with an address of its own; its files are those of every other host, as on a shared disk."""

    name: str
    address: str

    def start(self, command: list[str], cwd: Path, log: Path, **variables: str) -> subprocess.Popen[bytes]:
        """Run a command on this host; what it says goes to a file."""
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": INTERFACE, **variables}
        with log.open("ab") as output:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.name, *command],
                cwd=cwd,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def kill(self) -> None:
        """Everything that runs here ends at once."""
        for pid in ip("netns", "pids", self.name).split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)


def ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


def why_not() -> str:
    """Why hosts cannot be simulated here; empty where they can."""
    if shutil.which("ip") is None:
        return "no `ip` command"
    if os.geteuid() != 0:
        return "only root may make network namespaces"
    name = f"smelt-try-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if made.returncode:
        return f"network namespaces cannot be made here: {made.stderr.strip()}"
    ip("netns", "delete", name)
    return ""


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Two namespaces that reach each other and nobody else; gone at the end, with all that runs there."""
    hosts = tuple(Host(f"smelt-{os.getpid()}-{number}", f"10.77.7.{number}") for number in (1, 2))
    first, second = hosts
    try:
        for host in hosts:
            ip("netns", "add", host.name)
        peer = ("peer", "name", INTERFACE, "netns", second.name)
        ip("link", "add", INTERFACE, "netns", first.name, "type", "veth", *peer)
        for host in hosts:
            ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", INTERFACE)
            ip("-n", host.name, "link", "set", INTERFACE, "up")
            ip("-n", host.name, "link", "set", "lo", "up")
        yield first, second
    finally:
        for host in hosts:
            with suppress(subprocess.CalledProcessError):
                host.kill()
                ip("netns", "delete", host.name)
