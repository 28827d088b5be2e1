"""English that every Python carries: its language reference and the docstrings of its standard library.

Modules are parsed, never imported. Examples, tables and rulers are left out, so that prose remains. Knows no
tokenizer and no dataset.
"""

import ast
import inspect
import re
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from smelt.errors import NotFound

# Tests, vendored code, and modules whose docstrings say little.
LEFT_OUT = {
    *("__pycache__", "site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib", "lib2to3"),
    *("turtledemo", "ensurepip", "encodings", "pydoc_data", "_sysconfigdata"),
}
MIN_CHARS = 40  # shorter docstrings only repeat the name
RULER = re.compile(r"^\s*([-=*~^+|#_.])\1{2,}[-=*~^+|\s]*$|^\s*[+|].*[+|]\s*$")
Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@cache
def read_corpus() -> list[str]:
    """One document per topic of the reference and per module, in the order of their names."""
    folder = Path(sysconfig.get_path("stdlib"))
    texts = [*topics(folder), *module_texts(folder)]
    if not texts:
        raise NotFound(f"{folder} holds no Python sources; builtin:pydoc is made from them, so give another source")
    return texts


def topics(folder: Path) -> Iterator[str]:
    """The chapters of the language reference."""
    file = folder / "pydoc_data" / "topics.py"
    if not file.is_file():
        return
    for node in ast.parse(file.read_bytes()).body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Dict):
            yield from (prose(text) for _, text in sorted(ast.literal_eval(node.value).items()))


def module_texts(folder: Path) -> Iterator[str]:
    """The docstrings of each module, where they say enough."""
    for path in sorted(folder.rglob("*.py")):
        relative = path.relative_to(folder)
        if LEFT_OUT.isdisjoint(relative.parts):
            text = module_text(path, ".".join(relative.with_suffix("").parts).removesuffix(".__init__"))
            if len(text) >= 2 * MIN_CHARS:
                yield text


def module_text(path: Path, name: str) -> str:
    """What a module says about itself and about what it defines."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # templates for other versions of Python
        return ""
    parts = [_entry(f"The module {name}.", ast.get_docstring(tree, clean=False))]
    parts += [_entry(heading, ast.get_docstring(node, clean=False)) for heading, node in _definitions(tree.body, "")]
    return "\n\n".join(part for part in parts if part)


def _definitions(body: list[ast.stmt], prefix: str) -> Iterator[tuple[str, Definition]]:
    for node in body:
        if isinstance(node, ast.ClassDef):
            yield f"class {prefix}{node.name}", node
            yield from _definitions(node.body, f"{prefix}{node.name}.")
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{prefix}{node.name}({', '.join(_parameters(node.args))})", node


def _parameters(arguments: ast.arguments) -> list[str]:
    names = [argument.arg for argument in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]]
    return [name for name in names if name not in ("self", "cls")]


def _entry(heading: str, docstring: str | None) -> str:
    text = prose(inspect.cleandoc(docstring)) if docstring else ""
    return f"{heading}\n\n{text}" if len(text) >= MIN_CHARS else ""


def prose(text: str) -> str:
    """The text without sessions of the interpreter, tables and rulers."""
    kept: list[str] = []
    in_session = False
    for line in text.expandtabs().splitlines():
        in_session = line.lstrip().startswith(">>>") or (in_session and bool(line.strip()))
        is_repeated_blank = not line.strip() and (not kept or not kept[-1])
        if not (in_session or is_repeated_blank or RULER.match(line)):
            kept.append(line.rstrip())
    return "\n".join(kept).strip()
