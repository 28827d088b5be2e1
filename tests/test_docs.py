"""The documentation tells no lies that a test can find: commands parse, flags exist, settings and links are real."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from smelt.cli import app
from smelt.settings import Settings

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LAUNCHER = re.compile(r"torchrun\b.* -m (?=smelt)")
PYTHON_FENCE = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
FENCE = re.compile(r"^```(?:sh|bash|console)\n(.*?)^```", re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"`([^`]+)`")


def written_commands(page: Path) -> Iterator[str]:
    """Each `smelt ...` of a page: lines of its shell blocks, and code within sentences about what exists."""
    text = page.read_text().partition("## What comes next")[0]
    for block in FENCE.findall(text):
        yield from (line for line in block.replace("\\\n", " ").splitlines())
    for line in text.splitlines():
        yield from INLINE.findall(line) if "not yet" not in line.lower() else []


def arguments_of(line: str) -> list[str]:
    """The arguments of `smelt`, or none where the line is something else or leaves parts out.

    A verb without arguments is a mention of that verb, so it is asked for its help.
    """
    line = LAUNCHER.sub("", line.removeprefix("$ ")).removeprefix(".venv/bin/")
    if not line.startswith("smelt ") or line.endswith("...") or "|" in line:
        return []
    arguments = shlex.split(line, comments=True)[1:]
    is_mention = all(re.fullmatch("[a-z-]+", argument) for argument in arguments)
    return [*arguments, "--help"] if is_mention else arguments


COMMANDS = [
    (page.name, shlex.join(arguments))
    for page in PAGES
    for line in written_commands(page)
    if (arguments := arguments_of(line))
]


def parse(command: click.Command, name: str, arguments: list[str], parent: click.Context | None = None) -> None:
    """Parse as click would, without running anything; files that are named need not exist."""
    try:
        context = command.make_context(name, arguments, parent=parent)
    except click.BadParameter as error:
        if isinstance(error, click.MissingParameter) or "does not exist" not in error.format_message():
            raise
        return
    if isinstance(command, click.Group):
        rest = [*context._protected_args, *context.args]
        if rest:
            verb, found, remaining = command.resolve_command(context, rest)
            assert verb is not None
            assert found is not None
            parse(found, verb, remaining, context)


@pytest.mark.parametrize(("page", "written"), COMMANDS)
def test_a_command_in_the_documentation_parses(page: str, written: str) -> None:
    try:
        parse(app.command, "smelt", shlex.split(written))
    except click.exceptions.Exit:
        pass  # after printing help
    except click.UsageError as error:
        pytest.fail(f"{page}: smelt {written}: {error.format_message()}")


def test_commands_are_found_in_every_kind_of_place() -> None:
    pages = [page for page, _ in COMMANDS]
    assert pages.count("README.md") >= 15
    assert pages.count("coming-from.md") >= 30


@pytest.mark.parametrize("written", ["train --max-itres 3", "trian", "train stray", "doctor --deep"])
def test_the_check_sees_a_command_that_does_not_exist(written: str) -> None:
    with pytest.raises(click.UsageError):
        parse(app.command, "smelt", shlex.split(written))


def test_every_setting_is_documented() -> None:
    readme = (ROOT / "README.md").read_text()
    for name in Settings.model_fields:
        assert f"\n{name}:" in readme or f"`{name}`" in readme, name
        assert f"`SMELT_{name.upper()}`" in readme


def test_every_make_target_that_is_mentioned_exists() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        assert set(re.findall(r"`make ([a-z]+)", page.read_text())) <= targets, page.name


def test_every_recipe_is_mentioned() -> None:
    text = "".join(page.read_text() for page in PAGES)
    assert not [path.name for path in (ROOT / "examples").glob("*.yaml") if f"examples/{path.name}" not in text]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_named_exist(page: Path) -> None:
    named = re.findall(r"`((?:smelt|tests|docs|examples|scripts|benchmarks)/[\w/.-]+)`", page.read_text())
    assert not [name for name in named if not (ROOT / name).exists()]


def test_every_package_has_its_row_in_the_design() -> None:
    design = (ROOT / "docs/design.md").read_text()
    for package in (ROOT / "smelt").iterdir():
        if (package / "__init__.py").exists():
            assert re.search(rf"^\| .*`{package.name}`", design, re.MULTILINE), package.name


def test_the_python_of_the_readme_runs(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = PYTHON_FENCE.findall((ROOT / "README.md").read_text())
    assert "max_iters=500" in code
    monkeypatch.chdir(tmp_path)
    (tmp_path / "input.txt").write_text("Once upon a time there was a small model.\n" * 100)
    exec(code.replace("max_iters=500", "max_iters=2"), {})
    assert (tmp_path / "out-notes/last/model.safetensors").exists()
    assert capsys.readouterr().out.endswith("\n")
