"""A model's files on their way: which are kept, copied piece by piece, and a folder that appears whole or not at all.

Only weights, config and tokenizer are kept: no code, no pickles. Knows no registered name and no torch.
"""

import json
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from smelt.disk import check_room, is_full, sync
from smelt.errors import OutOfSpace
from smelt.models.architectures import CONFIG_FILE
from smelt.models.folders import INDEX_FILE, read_hf_config, read_json, weight_files
from smelt.models.hub import TOKENIZER_FILES

if TYPE_CHECKING:
    from smelt.data.sources import Progress

TEMPORARY = ".tmp-"
PIECE_BYTES = 8 << 20


def copy_model(source: Path, folder: Path, progress: "Progress | None" = None) -> None:
    """Copy weights, config and tokenizer, without references to code. OutOfSpace before it would run out."""
    files = [path for path in kept_files(source) if path.name != CONFIG_FILE]
    sizes = {path: path.stat().st_size for path in files}
    num_total, num_done = sum(sizes.values()), 0
    check_room(folder, num_total)
    hf = read_hf_config(source)
    hf.pop("auto_map", None)
    (folder / CONFIG_FILE).write_text(json.dumps(hf, indent=2), encoding="utf-8")
    for path in files:
        target = folder / path.relative_to(source)
        target.parent.mkdir(exist_ok=True)
        for num_bytes in _copied(path, target):
            num_done += num_bytes
            if progress is not None:
                progress("copying", num_done, num_total)
    _drop_code_reference(folder / "tokenizer_config.json")


def kept_files(source: Path) -> list[Path]:
    """The files of a model folder that an import keeps. Raises what `weight_files` raises."""
    weights = weight_files(source)
    index = [source / INDEX_FILE] if len(weights) > 1 else []
    named = (source / CONFIG_FILE, *index, *(source / name for name in TOKENIZER_FILES))
    return [*weights, *(path for path in named if path.is_file())]


def _copied(source: Path, target: Path) -> Iterator[int]:
    """Copy a file piece by piece; the bytes of each."""
    with source.open("rb") as reader, target.open("wb") as writer:
        while piece := reader.read(PIECE_BYTES):
            writer.write(piece)
            yield len(piece)


def _drop_code_reference(path: Path) -> None:
    if not path.is_file():
        return
    value = read_json(path)
    if isinstance(value, dict) and value.pop("auto_map", None) is not None:
        path.write_text(json.dumps(value, indent=2), encoding="utf-8")


def temporary_for(folder: Path) -> Path:
    """A new folder beside the one that it is to become."""
    temporary = folder.with_name(f"{TEMPORARY}{folder.name}-{secrets.token_hex(4)}")
    temporary.mkdir()
    return temporary


@contextmanager
def vanishing(temporary: Path, folder: Path) -> Iterator[None]:
    """Remove what was to become `folder` on any error. OutOfSpace where the disk was full."""
    try:
        yield
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError) and is_full(error):
            raise OutOfSpace(f"no space left for {folder}; free some and try again") from error
        raise


def sync_all(folder: Path) -> None:
    """Return when what a folder holds would survive a power loss."""
    for path in (*folder.rglob("*"), folder):
        sync(path)
