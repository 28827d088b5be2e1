"""Names and folders of models: what somebody may call a model, and the path that it means.

Knows registered names, folders, runs, nanoGPT's files and the hub's cache; opens no weights and knows no torch.
"""

import difflib
import re
from importlib import import_module
from pathlib import Path
from typing import Any

from smelt.data.bpe import MARKER_FILE
from smelt.data.hf_tokenizer import KEPT_FILES
from smelt.errors import InvalidInput, MissingDependency, NotFound
from smelt.models.architectures import CONFIG_FILE
from smelt.models.folders import INDEX_FILE, WEIGHTS_FILE

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?")
NANOGPT_FILE = "ckpt.pt"
RUN_LINKS = ("best", "last")  # what a run's folder points to, in the order of preference

# Names that everybody knows -> repositories of the hub; the older name may be the one in the cache.
HUB_NAMES = {name: (f"openai-community/{name}", name) for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")}
# What is fetched from the hub and kept on import: weights and tokenizer, never code or pickles.
TOKENIZER_FILES = (MARKER_FILE, *KEPT_FILES, "generation_config.json")
HUB_FILES = (CONFIG_FILE, WEIGHTS_FILE, INDEX_FILE, "model-*.safetensors", *TOKENIZER_FILES)


def resolve(name_or_folder: str, models_folder: Path) -> Path:
    """The model folder (or nanoGPT `ckpt.pt`) that a registered name, a path, `gpt2`... or `hf:ORG/NAME` means.

    A registered name wins over a folder of the same name here: write ./NAME for the folder. Raises NotFound,
    which lists what exists, and MissingDependency where the hub is needed but out of reach.
    """
    if name_or_folder.startswith("hf:"):
        return hub_folder(name_or_folder.removeprefix("hf:"))
    if is_registered(name_or_folder, models_folder):
        return models_folder / name_or_folder
    path = Path(name_or_folder).expanduser()
    if path.exists():
        return model_in(path)
    if name_or_folder in HUB_NAMES:
        return hub_folder(*HUB_NAMES[name_or_folder])
    raise NotFound(_not_found(name_or_folder, models_folder))


def is_registered(name: str, models_folder: Path) -> bool:
    """Whether a model of that name was imported or saved."""
    return NAME.fullmatch(name) is not None and (models_folder / name / CONFIG_FILE).is_file()


def registered_names(models_folder: Path) -> list[str]:
    """Names of all registered models, sorted."""
    return sorted(
        path.parent.name for path in models_folder.glob(f"*/{CONFIG_FILE}") if NAME.fullmatch(path.parent.name)
    )


def check_name(name: str) -> None:
    """InvalidInput where a model cannot be called that."""
    if not NAME.fullmatch(name):
        raise InvalidInput(
            f"model name {name!r} must begin with a letter or digit and have at most 64 letters, digits, '.', '_', '-'"
        )


def model_in(path: Path) -> Path:
    """The model at a path: the folder itself, a run's best or else last checkpoint, or nanoGPT's file in it."""
    if path.is_file():
        if path.suffix == ".pt":
            return path
        raise InvalidInput(f"{path} is a file; give the model's folder, or a nanoGPT {NANOGPT_FILE}")
    for folder in (path, *(path / link for link in RUN_LINKS)):
        if (folder / CONFIG_FILE).is_file():
            return folder.resolve()  # a link may move on while training goes on
    if (path / NANOGPT_FILE).is_file():
        return path / NANOGPT_FILE
    raise NotFound(
        f"{path} holds no model: neither {CONFIG_FILE} with {WEIGHTS_FILE}, nor checkpoints of a run, "
        f"nor nanoGPT's {NANOGPT_FILE}"
    )


def hub_folder(*repositories: str) -> Path:
    """The snapshot of the first of these repositories (one model by several names) in the hub's cache, else fetched."""
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
    return _download(hub, repositories[0])


def _cached(hub: Any, repository: str) -> Path | None:
    try:
        folder = Path(hub.snapshot_download(repository, allow_patterns=HUB_FILES, local_files_only=True))
    except hub.errors.LocalEntryNotFoundError:
        return None
    # The cache may hold only part of it, e.g. the tokenizer.
    is_whole = (folder / CONFIG_FILE).is_file() and any((folder / f).is_file() for f in (WEIGHTS_FILE, INDEX_FILE))
    return folder if is_whole else None


def _download(hub: Any, repository: str) -> Path:
    try:
        return Path(hub.snapshot_download(repository, allow_patterns=HUB_FILES))
    except hub.errors.RepositoryNotFoundError:
        raise NotFound(f"the Hugging Face hub has no {repository}, or it needs a login (hf auth login)") from None
    except OSError as error:  # the library's own errors, and those of the network below it
        reason = str(error).strip().split("\n")[0][:200]
        raise MissingDependency(
            f"{repository} is not in the local hub cache and cannot be fetched ({reason}). "
            f"Fetch it where there is a network, or set HF_HOME to a cache that has it, or give a folder"
        ) from None


def _not_found(name: str, models_folder: Path) -> str:
    names = registered_names(models_folder)
    close = difflib.get_close_matches(name, [*names, *HUB_NAMES], n=3)
    parts = [f"no model or folder {name!r}"]
    if close:
        parts.append(f"did you mean {' or '.join(close)}?")
    parts.append(
        f"registered models: {', '.join(names)}" if names else "no model is registered yet (smelt models import)"
    )
    return "; ".join(parts)
