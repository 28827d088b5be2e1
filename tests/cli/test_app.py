"""The front door: every failure is one line and an exit code, and `--help` teaches without importing anything heavy."""

import subprocess
import sys
import types

import click
import pytest

from smelt.cli import app
from smelt.errors import NotEnoughData, SmeltError


def run_with(monkeypatch: pytest.MonkeyPatch, failure: BaseException | None) -> int:
    """The exit code of a verb that fails so."""

    @click.command()
    def verb() -> None:
        if failure is not None:
            raise failure

    module = types.ModuleType("smelt.cli.pretended")
    module.command = verb  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "smelt.cli.pretended", module)
    monkeypatch.setitem(app.VERBS, "pretended", ("smelt.cli.pretended", "Fail as told."))
    return exit_code(["pretended"])


def exit_code(arguments: list[str]) -> int:
    try:
        app.main(arguments)
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_success_is_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_with(monkeypatch, None) == 0


@pytest.mark.parametrize("failure", [SmeltError("no such thing"), NotEnoughData("no such thing")])
def test_a_mistake_is_one_line_and_two(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], failure: SmeltError
) -> None:
    assert run_with(monkeypatch, failure) == 2
    assert capsys.readouterr() == ("", "error: no such thing\n")


def test_ctrl_c_is_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_with(monkeypatch, KeyboardInterrupt()) == 130
    assert capsys.readouterr().err.strip() == "interrupted"


def test_a_verb_may_choose_its_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_with(monkeypatch, click.exceptions.Exit(1)) == 1


def test_a_bug_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ZeroDivisionError):
        run_with(monkeypatch, ZeroDivisionError())


def test_a_misspelt_verb_is_answered_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(["genrate"]) == 2
    assert capsys.readouterr().err == (
        "error: No such command 'genrate'. Did you mean 'generate'? (see smelt --help)\n"
    )


def test_a_misspelt_flag_is_answered_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(["--hlep"]) == 2
    assert capsys.readouterr().err == "error: No such option '--hlep'. Did you mean '--help'? (see smelt --help)\n"


def test_help_lists_every_verb_and_shows_examples(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"\n  {verb} " in text for verb in app.VERBS)
    assert "Examples:" in text


def test_version_comes_from_the_package() -> None:
    shown = subprocess.run([sys.executable, "-m", "smelt", "--version"], capture_output=True, text=True, check=True)
    assert shown.stdout == f"smelt, version {app.__version__}\n"
