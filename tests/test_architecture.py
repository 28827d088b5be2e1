"""The house rules that no linter knows: sizes, names, depth, the README's map, what help shows, what imports what."""

import ast
import importlib
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from pydantic import BaseModel

import smelt
from smelt.cli import app
from smelt.configs import DecoderConfig, RopeScaling
from smelt.run_configs import TrainConfig
from smelt.settings import Settings

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "smelt"
MODULES = sorted(PACKAGE.rglob("*.py"))
MAX_LINES = 500
DUMPING_GROUNDS = {"utils", "util", "helpers", "helper", "common", "misc", "base", "core", "manager", "shared"}
# The web side is made of these, and it starts without torch.
TORCHLESS = (
    "api",
    "dashboard",
    "control",
    "data",
    "storage",
    "transport",
    "settings",
    "configs",
    "types",
    "disk",
    "errors",
)
# A subclass that refuses every class, so that only plain data comes out (nanoGPT's meta.pkl).
ALLOWED_UNPICKLERS = {("smelt/data/characters.py", "pickle.Unpickler")}
CODE_RUNNING_LOADERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}


def name_of(module: Path) -> str:
    return str(module.relative_to(ROOT))


def test_no_file_is_long() -> None:
    long = {name_of(path): lines for path in MODULES if (lines := len(path.read_text().splitlines())) > MAX_LINES}
    assert not long


def test_no_file_is_a_dumping_ground() -> None:
    assert not [name_of(path) for path in MODULES if path.stem.strip("_") in DUMPING_GROUNDS]


def test_packages_are_one_level_deep() -> None:
    assert not [name_of(path) for path in MODULES if len(path.relative_to(PACKAGE).parts) > 2]


def test_packages_export_nothing_themselves() -> None:
    assert not [name_of(path) for path in PACKAGE.glob("*/__init__.py") if path.read_text()]


@pytest.mark.parametrize("module", [path for path in MODULES if path.read_text()], ids=name_of)
def test_a_module_opens_with_a_sentence(module: Path) -> None:
    docstring = ast.get_docstring(ast.parse(module.read_text())) or ""
    assert docstring.partition("\n")[0].endswith((".", "!", "?"))


def test_the_readme_has_the_map_of_the_code() -> None:
    readme = (ROOT / "README.md").read_text()
    assert runpy.run_path(str(ROOT / "scripts/readme_map.py"))["replaced_map"](readme) == readme, "run `make map`"


def test_the_public_names_are_these() -> None:
    names = ["TextModel", "TrainConfig", "evaluate", "load", "load_classifier", "prepare_data", "train"]
    assert smelt.__all__ == names
    assert all(getattr(smelt, name).__doc__ for name in smelt.__all__)


def test_an_unknown_public_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        _ = smelt.lode


@pytest.mark.parametrize("config_class", [TrainConfig, DecoderConfig, RopeScaling, Settings])
def test_every_field_says_what_it_is(config_class: type[BaseModel]) -> None:
    assert not [name for name, field in config_class.model_fields.items() if not field.description]


def commands(command: click.Command, path: str) -> Iterator[tuple[str, click.Command, str]]:
    """(full name, command, help text with that of the groups above) of each command that does something."""
    help_text = command.get_help(click.Context(command, info_name=path))
    if not isinstance(command, click.Group):
        yield path, command, help_text
        return
    context = click.Context(command)
    for name in command.list_commands(context):
        found = command.get_command(context, name)
        assert found is not None
        for full_name, leaf, leaf_help in commands(found, f"{path} {name}"):
            yield full_name, leaf, leaf_help + help_text


def test_every_command_teaches_with_an_example() -> None:
    for name, _, help_text in commands(app.command, "smelt"):
        assert re.search(rf"Examples:.*^ *(.*-m )?{name}\b", help_text, re.DOTALL | re.MULTILINE), name


def test_every_option_says_what_it_does() -> None:
    silent = [
        f"{name} {parameter.opts[0]}"
        for name, command, _ in commands(app.command, "smelt")
        for parameter in command.params
        if isinstance(parameter, click.Option) and not parameter.help
    ]
    assert not silent


def test_the_table_of_verbs_says_what_the_verbs_themselves_say() -> None:
    context = click.Context(app.command)
    for verb, (_, line) in app.VERBS.items():
        found = app.command.get_command(context, verb)
        assert found is not None
        assert found.get_short_help_str(limit=200) == line


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_help_imports_nothing_heavy() -> None:
    code = """
import sys
from smelt.cli.app import main
try:
    main(["--help"])
except SystemExit as stop:
    assert not stop.code
print(sorted({"torch", "numpy", "pydantic", "pyarrow", "rich"} & set(sys.modules)))
"""
    assert run_python(code).splitlines()[-1] == "[]"


def test_what_the_web_side_needs_starts_without_torch() -> None:
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in MODULES
        if path.relative_to(PACKAGE).parts[0].removesuffix(".py") in TORCHLESS and path.name != "__init__.py"
    ]
    assert len(modules) >= len(TORCHLESS)
    imports = "\n".join(f"import {module}" for module in modules)
    run_python(f"import sys\nsys.modules['torch'] = None  # importing it raises\n{imports}")


def unpicklers(tree: ast.Module) -> Iterator[str]:
    """What a module takes from packages whose loading runs code; their exceptions are harmless."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module in CODE_RUNNING_LOADERS:
            yield from (alias.name for alias in node.names if not alias.name.endswith("Error"))
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) in CODE_RUNNING_LOADERS:
            yield from [ast.unparse(node)] if not node.attr.endswith("Error") else []


def unsafe_calls(tree: ast.Module) -> Iterator[str]:
    """Calls that may run code found in a file, or in a string."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if called == "torch.load" and keywords.get("weights_only") != "True":
            yield f"line {node.lineno}: torch.load without weights_only=True"
        if keywords.get("allow_pickle") == "True" or keywords.get("trust_remote_code") == "True":
            yield f"line {node.lineno}: {called} that trusts its file"
        if called in ("eval", "exec", "yaml.load", "yaml.unsafe_load", "os.system"):
            yield f"line {node.lineno}: {called}"
        if keywords.get("shell") == "True":
            yield f"line {node.lineno}: {called} through a shell"


@pytest.mark.parametrize("module", MODULES, ids=name_of)
def test_no_file_can_run_code_when_it_is_read(module: Path) -> None:
    tree = ast.parse(module.read_text())
    assert not {(name_of(module), taken) for taken in unpicklers(tree)} - ALLOWED_UNPICKLERS
    assert not list(unsafe_calls(tree))


@pytest.mark.parametrize(
    "line",
    ["torch.load(path)", "np.load(path, allow_pickle=True)", "eval(text)", "subprocess.run(text, shell=True)"],
)
def test_the_check_for_unsafe_calls_sees_them(line: str) -> None:
    assert list(unsafe_calls(ast.parse(line)))


@pytest.mark.parametrize("line", ["from pickle import loads", "import pickle\npickle.Unpickler(file)"])
def test_the_check_for_unpicklers_sees_them(line: str) -> None:
    assert list(unpicklers(ast.parse(line)))


def test_modules_import_on_their_own() -> None:
    for path in MODULES:
        if path.name != "__main__.py":
            importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"))
