"""Other names for registered models: a small file beside them, read and written whole; knows no model."""

import json
import secrets
from collections.abc import Mapping
from pathlib import Path

from smelt.disk import sync
from smelt.errors import StorageError

ALIASES_FILE = "aliases.json"
DEFAULT = "default"
DEFAULT_NAMES = ("gpt", DEFAULT)  # what the default model is called too


def read_aliases(models_folder: Path) -> dict[str, str]:
    """alias -> name of a registered model, sorted; none where nobody made any. StorageError where it is damaged."""
    path = models_folder / ALIASES_FILE
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise StorageError(f"{path} is damaged ({error}); correct it, or remove it") from None
    if not isinstance(value, dict) or not all(isinstance(target, str) for target in value.values()):
        raise StorageError(f"{path} must hold an object of names to names; correct it, or remove it")
    return dict(sorted(value.items()))


def write_aliases(aliases: Mapping[str, str], models_folder: Path) -> None:
    """Replace them all: a reader finds the old ones or the new, whatever dies meanwhile."""
    write_whole(models_folder / ALIASES_FILE, json.dumps(dict(sorted(aliases.items())), indent=1))


def write_whole(path: Path, text: str) -> None:
    """Replace a small file, synced, whole or not at all."""
    temporary = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
    try:
        temporary.write_text(text, encoding="utf-8")
        sync(temporary)
        temporary.rename(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)
