"""Models of the Hugging Face hub: in its cache on this disk, or fetched into it; knows no registered name."""

import io
import re
import threading
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smelt.data.bpe import MARKER_FILE
from smelt.data.hf_tokenizer import KEPT_FILES
from smelt.disk import check_room
from smelt.errors import InvalidInput, MissingDependency, NotFound, OutOfSpace
from smelt.models.architectures import CONFIG_FILE
from smelt.models.folders import INDEX_FILE, WEIGHTS_FILE

if TYPE_CHECKING:
    from smelt.data.sources import Progress

REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?")
# What is fetched and kept on import: weights and tokenizer, never code or pickles.
TOKENIZER_FILES = (MARKER_FILE, *KEPT_FILES, "generation_config.json")
HUB_FILES = (CONFIG_FILE, WEIGHTS_FILE, INDEX_FILE, "model-*.safetensors", *TOKENIZER_FILES)


def hub_folder(*repositories: str, progress: "Progress | None" = None) -> Path:
    """The snapshot of the first of these repositories (one model by several names) in the hub's cache, else fetched.

    `progress` hears of what is fetched; None: the hub's own bars on a terminal. OutOfSpace before anything is fetched.
    """
    for repository in repositories:
        if not REPOSITORY.fullmatch(repository):
            raise InvalidInput(f"{repository!r} is not a repository of the hub; write hf:ORG/NAME")
    try:
        hub = import_module("huggingface_hub")
    except ImportError:
        raise MissingDependency(
            f"{repositories[0]} comes from the Hugging Face hub: pip install 'smelt[hub]', or give a folder"
        ) from None
    for repository in repositories:
        cached = _cached(hub, repository)
        if cached is not None:
            return cached
    return _download(hub, repositories[0], progress)


def _cached(hub: Any, repository: str) -> Path | None:
    try:
        folder = Path(hub.snapshot_download(repository, allow_patterns=HUB_FILES, local_files_only=True))
    except hub.errors.LocalEntryNotFoundError:
        return None
    # The cache may hold only part of it, e.g. the tokenizer.
    is_whole = (folder / CONFIG_FILE).is_file() and any((folder / f).is_file() for f in (WEIGHTS_FILE, INDEX_FILE))
    return folder if is_whole else None


def _download(hub: Any, repository: str, progress: "Progress | None") -> Path:
    told = {} if progress is None else {"tqdm_class": _bars_into(progress)}
    try:
        wanted = hub.snapshot_download(repository, allow_patterns=HUB_FILES, dry_run=True)
        check_room(_cache_folder(hub), sum(file.file_size or 0 for file in wanted if file.will_download))
        return Path(hub.snapshot_download(repository, allow_patterns=HUB_FILES, **told))
    except hub.errors.RepositoryNotFoundError:
        raise NotFound(f"the Hugging Face hub has no {repository}, or it needs a login (hf auth login)") from None
    except OutOfSpace:
        raise
    except OSError as error:  # the library's own errors, and those of the network below it
        reason = str(error).strip().split("\n")[0][:200]
        raise MissingDependency(
            f"{repository} is not in the local hub cache and cannot be fetched ({reason}). "
            f"Fetch it where there is a network, or set HF_HOME to a cache that has it, or give a folder"
        ) from None


def _cache_folder(hub: Any) -> Path:
    return Path(hub.constants.HF_HUB_CACHE)


def _bars_into(progress: "Progress") -> type:
    """A class of progress bars, as the hub's library wants one, that tell `progress` and draw nothing."""
    tqdm: Any = import_module("tqdm").tqdm

    class Told(tqdm):  # type: ignore[misc]
        """Counts bytes; the library also counts files so, which nobody needs."""

        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **{**options, "file": io.StringIO(), "disable": False})

        def update(self, num_more: float | None = 1) -> Any:
            """More has come."""
            super().update(num_more)
            if self.unit == "B":
                progress("fetching", int(self.n), int(self.total) if self.total else None)

    Told.set_lock(threading.RLock())
    return Told
