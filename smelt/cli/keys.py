"""`smelt keys`: make, list and revoke API keys; prints, the work is in `control.keys`."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import TYPE_CHECKING

import click

from smelt.settings import load_settings

if TYPE_CHECKING:
    from sqlalchemy import Connection

EXAMPLES = """\b
Examples:
  smelt keys create laptop
  smelt keys create dashboard --scope inference --scope training --scope admin
  smelt keys create class --owner students --scope inference --requests-per-minute 60 --max-concurrent 4
  smelt keys ls
  smelt keys revoke laptop
  smelt keys rm laptop"""

owner_option = click.option("--owner", default="local", show_default=True, help="whose key it is")


@click.group(epilog=EXAMPLES)
def command() -> None:
    """Make, list and revoke API keys.

    A server on this machine's own address needs no key until the first is made, and from then on each request does:
    behind a proxy everybody looks local. A running server notices within a second.
    """


@command.command("create", epilog=EXAMPLES)
@click.argument("name")
@click.option(
    "--scope",
    "scopes",
    multiple=True,
    type=click.Choice(["inference", "training", "admin"]),
    default=["inference", "training"],
    show_default=True,
    help="what it opens, repeatable; admin opens everything, other owners' runs and /metrics too",
)
@owner_option
@click.option("--requests-per-minute", type=click.IntRange(1), help="how many requests it may make (any number)")
@click.option("--max-concurrent", type=click.IntRange(1), help="how many requests at once (any number)")
def create_command(
    name: str, scopes: tuple[str, ...], owner: str, requests_per_minute: int | None, max_concurrent: int | None
) -> None:
    """Make the key NAME and show it, this once: only its hash is kept."""
    from smelt.control.keys import create_key

    with database() as connection:
        text = create_key(connection, name, owner, scopes, requests_per_minute, max_concurrent)
    click.echo(text)
    click.echo(
        "keep it: it is not shown again. Clients send it as `Authorization: Bearer KEY`, browsers at /login", err=True
    )


@command.command("ls")
def list_command() -> None:
    """List all keys, revoked ones too; what they are is not known any more."""
    from rich.console import Console
    from rich.table import Table

    from smelt.storage.records import all_keys

    with database() as connection:
        keys = all_keys(connection)
    if not keys:
        click.echo("no keys yet; make one: smelt keys create NAME")
        return
    table = Table("name", "owner", "scopes", "per minute", "at once", "made", "revoked", box=None, pad_edge=False)
    for key in keys:
        limits = (str(limit or "any") for limit in (key.requests_per_minute, key.max_concurrent))
        table.add_row(key.name, key.owner, " ".join(key.scopes), *limits, day(key.created), day(key.revoked))
    Console().print(table, markup=False)


@command.command("revoke", epilog="\b\nExample:\n  smelt keys revoke laptop")
@click.argument("name")
@owner_option
def revoke_command(name: str, owner: str) -> None:
    """Have the key NAME open nothing any more."""
    from smelt.control.keys import revoke_key

    with database() as connection:
        revoke_key(connection, name, owner)
    click.echo(f"revoked {name}", err=True)


@command.command("rm", epilog="\b\nExample:\n  smelt keys rm laptop")
@click.argument("name")
@owner_option
def remove_command(name: str, owner: str) -> None:
    """Forget the revoked key NAME. Without any, revoked or not, a server on this machine's address needs no key."""
    from smelt.control.keys import remove_key

    with database() as connection:
        remove_key(connection, name, owner)
    click.echo(f"removed {name}", err=True)


@contextmanager
def database() -> Iterator["Connection"]:
    """A transaction on the database of the settings, beside a server that may be running."""
    from smelt.storage.database import WRITES, open_database

    settings = load_settings()
    settings.home.mkdir(mode=0o700, parents=True, exist_ok=True)
    engine = open_database(settings.database_url)
    try:
        with engine.execution_options(**{WRITES: True}).begin() as connection:
            yield connection
    finally:
        engine.dispose()


def day(seconds: float | None) -> str:
    """A time as people write it here; nothing for none."""
    return "" if seconds is None else datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M")
