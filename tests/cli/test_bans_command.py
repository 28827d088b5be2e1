"""`smelt bans`: bans are made, listed and lifted beside a server that may be running."""

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from smelt.cli import bans, keys
from smelt.errors import AlreadyExists, NotFound


def run(*arguments: str, command: object = bans.command) -> Result:
    result = CliRunner().invoke(command, arguments, standalone_mode=False, env={"COLUMNS": "160"})  # type: ignore[arg-type]
    if result.exception is not None:
        raise result.exception
    return result


def test_a_ban_comes_and_goes(home: Path) -> None:
    assert "nobody is banned" in run("ls").stdout
    run("create", "laptop", command=keys.command)
    assert "banned laptop, user eve" in run("add", "laptop", "--user", "eve", "--reason", "spam").stderr
    run("add", "local")
    rows = {tuple(line.split()[:3]): line for line in run("ls").stdout.splitlines()}
    assert rows["laptop", "local", "eve"].split()[-1] == "spam"
    assert any(line.startswith("local") and "by the administrator" in line for line in rows.values())
    with pytest.raises(AlreadyExists, match="smelt bans ls"):
        run("add", "laptop", "--user", "eve")
    with pytest.raises(NotFound, match="there are: laptop"):
        run("add", "phone")
    assert "forgave laptop, user eve" in run("rm", "laptop", "--user", "eve").stderr
    run("rm", "local")
    assert "nobody is banned" in run("ls").stdout
