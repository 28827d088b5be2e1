"""`smelt serve`: checks what can be wrong, says where the server is, and leaves the rest to the supervisor."""

import asyncio
import logging
import socket
from pathlib import Path

import click

from smelt.errors import ConfigError, TokenizerError
from smelt.settings import Settings

EXAMPLES = """\b
Examples:
  smelt serve
  smelt serve out
  smelt serve out --port 8080
  smelt serve --config /etc/smelt.yaml --no-worker
  smelt serve --host 0.0.0.0          (needs a key: smelt keys create NAME)
  smelt serve --worker-address 0.0.0.0:8001 --tls-certificate cert.pem --tls-key key.pem"""

FILE = click.Path(path_type=Path)


@click.command(epilog=EXAMPLES, short_help="Serve models to OpenAI clients, and pages to watch runs on.")
@click.argument("model", required=False)
@click.option("--config", type=FILE, metavar="FILE", help="Read settings from this file in place of smelt.yaml.")
@click.option("--host", help="Address to serve on (127.0.0.1); any but this machine's own needs an API key.")
@click.option("--port", type=int, help="Port to serve on (8000); 0 picks a free one.")
@click.option("--quantize", help="none, or int8: weights rounded to a byte each, faster where few answers run.")
@click.option("--no-worker", is_flag=True, help="Start no worker here: others dial in with `smelt worker`.")
@click.option("--worker-address", metavar="HOST:PORT", help="Let workers of other machines dial in here, with TLS.")
@click.option("--tls-certificate", type=FILE, metavar="FILE", help="The certificate that they are shown (PEM).")
@click.option("--tls-key", type=FILE, metavar="FILE", help="Its private key (PEM).")
def command(
    model: str | None,
    config: Path | None,
    host: str | None,
    port: int | None,
    quantize: str | None,
    no_worker: bool,
    worker_address: str | None,
    tls_certificate: Path | None,
    tls_key: Path | None,
) -> None:
    """Serve a model (a name of `smelt models ls`, a folder, a run's out-dir), and all registered ones beside it.

    OpenAI's clients reach them under /v1; the page at / shows runs and a playground. The server runs until Ctrl-C,
    and then lets answers finish first; a second Ctrl-C does not. Whatever it has accepted survives it, however it
    ends.
    """
    from smelt.settings import load_settings, use_config_file
    from smelt.transport.addresses import is_loopback

    if config is not None:
        use_config_file(config)
    tls = {"tls_certificate": tls_certificate, "tls_key": tls_key}
    settings = load_settings(host=host, port=port, quantize=quantize, worker_address=worker_address, **tls)
    model = lasting_name(model, settings) if model is not None else None
    check_worker_door(settings)
    if not is_loopback(settings.host):
        from smelt.control.keys import check_exposed  # imports the database's library, a quarter of our start

        check_exposed(settings)
    raise click.exceptions.Exit(serve(settings, model, with_worker=not no_worker))


def serve(settings: Settings, model: str | None, with_worker: bool) -> int:
    """Run the server until it is told to stop; its exit code."""
    from smelt.cluster.claims import base_url, held_home, listening_socket, note_address
    from smelt.cluster.supervisor import Supervisor, programs
    from smelt.control.catalogue import forget_choice
    from smelt.settings import environment_of

    logging.basicConfig(level=logging.INFO, format="%(asctime)s supervisor: %(message)s")
    with held_home(settings.home), listening_socket(settings.host, settings.port) as listener:
        note_address(settings.home, base_url(listener))
        forget_choice(settings.models)
        supervisor = Supervisor(programs(settings, listener, model, with_worker), listener, environment_of(settings))
        return asyncio.run(supervisor.run(lambda: say_where(listener, model, settings)))


def say_where(listener: socket.socket, model: str | None, settings: Settings) -> None:
    """Tell the addresses that somebody needs now."""
    from smelt.cluster.claims import base_url
    from smelt.control.catalogue import served_name

    url = base_url(listener)
    click.echo(f"page:   {url}/dashboard")
    click.echo(f"OpenAI: {url}/v1")
    click.echo(f"model:  {served_name(model, settings.models) if model else 'none given; see smelt models ls'}")


def lasting_name(model: str, settings: Settings) -> str:
    """What every process can call the model, whatever folder it runs in. Raises where it cannot be served."""
    from smelt.control.models import show_model
    from smelt.models.registry import is_registered

    info = show_model(model, settings.models)
    if info.problem is not None:
        raise ConfigError(f"{model} cannot be served: {info.problem}")
    if info.tokenizer is None:
        raise TokenizerError(f"{model} has no tokenizer; put its tokenizer.json beside the weights")
    if is_registered(info.name, settings.models):  # also where an alias was given
        return info.name
    path = Path(model).expanduser()
    return str(path.absolute()) if path.exists() else model


def check_worker_door(settings: Settings) -> None:
    """ConfigError where workers of other machines could not dial in."""
    if settings.worker_address is not None and None in (settings.tls_certificate, settings.tls_key):
        raise ConfigError("--worker-address needs TLS: give --tls-certificate and --tls-key")
