"""The README's map of the code, made from the first line of each module: print it, or put it there with --write.

Knows no meaning of any module; the order of packages is that of the import contract in pyproject.toml.
"""

import argparse
import ast
import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
BEGIN, END = "<!-- map: made by `make map` -->\n```text\n", "```\n<!-- end of map -->"


def first_line(module: Path) -> str:
    """The first line of a module's docstring."""
    docstring = ast.get_docstring(ast.parse(module.read_text(encoding="utf-8"))) or ""
    return docstring.partition("\n")[0]


def rows_of_import_contract() -> list[str]:
    """Packages and root modules of smelt, from the top of the import contract down."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    return [name for row in layers for name in re.split(r"\s*[|:]\s*", row)]


def render() -> str:
    """The map, one line per module."""
    lines = ["smelt/"]
    for name in rows_of_import_contract():
        package = ROOT / "smelt" / name
        if not package.is_dir():
            lines.append(f"  {name + '.py':<19} {first_line(package.with_suffix('.py'))}")
            continue
        modules = sorted(path for path in package.glob("*.py") if path.name != "__init__.py")
        if modules:
            lines.append(f"  {name}/")
            lines.extend(f"    {path.name:<18}{first_line(path)}" for path in modules)
    return "\n".join(lines) + "\n"


def replaced_map(readme: str) -> str:
    """The README's text with a fresh map between its two marks."""
    before, rest = readme.split(BEGIN)
    return before + BEGIN + render() + END + rest.split(END)[1]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="rewrite the map in README.md")
    if parser.parse_args().write:
        README.write_text(replaced_map(README.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(render(), end="")
