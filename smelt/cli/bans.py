"""`smelt bans`: list, make and lift bans; prints, the work is in `control.bans`."""

import click

from smelt.cli.keys import database, day

EXAMPLES = """\b
Examples:
  smelt bans ls
  smelt bans add laptop --user eve --reason "sells spam"
  smelt bans rm laptop --user eve"""

owner_option = click.option("--owner", default="local", show_default=True, help="whose key it is")
user_option = click.option("--user", default="", help="only this `user` of the key (everybody who has the key)")


@click.group(epilog=EXAMPLES)
def command() -> None:
    """List, make and lift bans: who broke too many rules may ask for nothing.

    The rules are in a YAML file that the setting `ban_rules` names; see docs/serving.md. A running server notices
    within a second. Where nobody needs a key, the KEY is `local`.
    """


@command.command("ls")
def list_command() -> None:
    """List who is banned and why, and who has strikes."""
    from rich.console import Console
    from rich.table import Table

    from smelt.control.bans import standings

    with database() as connection:
        found = standings(connection)
    if not found:
        click.echo("nobody is banned, and nobody has a strike")
        return
    table = Table("key", "owner", "user", "strikes", "banned", "reason", box=None, pad_edge=False)
    for each in found:
        table.add_row(
            each.key, each.owner, each.user or "", str(each.num_strikes), day(each.since) or "no", each.reason or ""
        )
    Console().print(table, markup=False)


@command.command("add", epilog='\b\nExample:\n  smelt bans add laptop --user eve --reason "sells spam"')
@click.argument("key")
@owner_option
@user_option
@click.option("--reason", default="by the administrator", show_default=True, help="what they are told")
def add_command(key: str, owner: str, user: str, reason: str) -> None:
    """Ban the key named KEY, or one of its users."""
    from smelt.control.bans import ban_by_hand

    with database() as connection:
        ban_by_hand(connection, key, owner, user, reason)
    click.echo(f"banned {key}{f', user {user}' if user else ''}", err=True)


@command.command("rm", epilog="\b\nExample:\n  smelt bans rm laptop --user eve")
@click.argument("key")
@owner_option
@user_option
def remove_command(key: str, owner: str, user: str) -> None:
    """Forgive the key named KEY, strikes and all, or one of its users."""
    from smelt.control.bans import forgive

    with database() as connection:
        forgive(connection, key, owner, user)
    click.echo(f"forgave {key}{f', user {user}' if user else ''}", err=True)
