"""`smelt worker`: flags into a worker that dials in to a server, here or on another machine; computes nothing."""

import asyncio
import logging
import ssl
from pathlib import Path
from typing import TYPE_CHECKING

import click

from smelt.errors import ConfigError

if TYPE_CHECKING:
    from smelt.settings import Settings
    from smelt.transport.addresses import Address

EXAMPLES = """\b
Examples:
  smelt worker                                  one more for the server of this home folder
  SMELT_DEVICE=cuda:1 smelt worker              on another GPU
  smelt worker --connect 10.0.0.5:8001 --key-file worker.key --tls-certificate server.pem

\b
The server there takes workers in when it is started so:
  smelt serve --worker-address 0.0.0.0:8001 --tls-certificate server.pem --tls-key server-key.pem
Copy its HOME/worker.key and the certificate to the worker, which needs the same registered models."""


@click.command(epilog=EXAMPLES, short_help="Compute answers for a server, from this machine or another.")
@click.option(
    "--connect", metavar="ADDRESS", help="HOST:PORT or the path of a socket. [the server of this home folder]"
)
@click.option("--preload", metavar="MODEL", help="Load this model (a name or folder) before anybody asks for it.")
@click.option("--quantize", help="none, or int8: weights rounded to a byte each, faster where few answers run.")
@click.option("--key-file", type=Path, help="The key that the server knows. [HOME/worker.key]")
@click.option("--tls-certificate", type=Path, help="PEM file of the certificate that the server shows.")
def command(
    connect: str | None,
    preload: str | None,
    quantize: str | None,
    key_file: Path | None,
    tls_certificate: Path | None,
) -> None:
    """Join a server as a worker: it loads registered models when they are first asked for, and answers with them.

    It dials in again when the server restarts, and keeps its models. Ctrl-C (or SIGTERM) lets what runs finish first;
    a second one does not wait. Off this machine the connection needs TLS and a key; both ends must know the same.
    """
    from smelt.cluster.worker import run_worker
    from smelt.models.registry import registered_name
    from smelt.settings import load_settings

    logging.basicConfig(level=logging.INFO, format="%(asctime)s worker: %(message)s")
    settings = load_settings(quantize=quantize, worker_key=key_file, tls_certificate=tls_certificate)
    if preload is not None and not Path(preload).expanduser().exists():
        preload = registered_name(preload, settings.models) or preload  # requests say the name, never an alias
    address = address_of(connect, settings)
    key, tls = credentials(address, settings)
    asyncio.run(run_worker(settings, address, preload, key, tls))


def address_of(connect: str | None, settings: "Settings") -> "Address":
    """A path where there is a slash, else HOST:PORT. ConfigError for neither."""
    from smelt.settings import runtime_folder
    from smelt.transport.addresses import host_and_port, socket_path

    if connect is None:
        return socket_path(settings.home, runtime_folder())
    if "/" in connect:
        return Path(connect)
    host_and_port(connect)
    return connect


def credentials(address: "Address", settings: "Settings") -> tuple[bytes | None, ssl.SSLContext | None]:
    """(key, TLS) for that address; on this machine's own socket neither is needed."""
    from smelt.transport.addresses import client_tls
    from smelt.transport.keys import read_key

    if isinstance(address, Path):
        return None, None
    if settings.tls_certificate is None:
        raise ConfigError(f"{address} needs the certificate that the server shows: give --tls-certificate FILE")
    return read_key(settings.worker_key_file), client_tls(settings.tls_certificate)
