"""`smelt keys`: a key is printed once, alone on stdout, and what is listed gives none away."""

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from smelt.cli.keys import command
from smelt.errors import AlreadyExists, InvalidInput, NotFound


def run(*arguments: str) -> Result:
    result = CliRunner().invoke(command, arguments, standalone_mode=False, env={"COLUMNS": "160"})
    if result.exception is not None:
        raise result.exception
    return result


def test_a_key_comes_and_goes(home: Path) -> None:
    assert "smelt keys create" in run("ls").stdout
    made = run("create", "laptop")
    text = made.stdout.strip()
    assert made.stdout == f"{text}\n"
    assert text.startswith("tml-")
    assert "not shown again" in made.stderr
    (row,) = [line.split() for line in run("ls").stdout.splitlines() if line.startswith("laptop")]
    assert row[1:6] == ["local", "inference", "training", "any", "any"]
    run("revoke", "laptop")
    listed = run("ls").stdout
    assert text not in listed
    assert len([line for line in listed.splitlines() if line.startswith("laptop")][0].split()) == len(row) + 2
    run("rm", "laptop")
    assert "no keys yet" in run("ls").stdout
    assert home.stat().st_mode & 0o077 == 0


def test_a_key_gets_what_was_asked_for(home: Path) -> None:
    limits = ("--requests-per-minute", "60", "--max-concurrent", "4")
    run("create", "class", "--owner", "students", "--scope", "inference", *limits)
    (row,) = [line.split() for line in run("ls").stdout.splitlines() if line.startswith("class")]
    assert row[1:5] == ["students", "inference", "60", "4"]


def test_mistakes_end_with_a_word(home: Path) -> None:
    run("create", "laptop")
    with pytest.raises(AlreadyExists):
        run("create", "laptop")
    with pytest.raises(NotFound, match="there are: laptop"):
        run("revoke", "phone")
    with pytest.raises(InvalidInput, match="revoke it first"):
        run("rm", "laptop")
