"""Names and folders of models: what somebody may call a model, and the path that it means.

Knows registered names and their aliases, folders, runs and nanoGPT's files; opens no weights and knows no torch.
"""

import difflib
import re
from pathlib import Path
from typing import TYPE_CHECKING

from smelt.errors import InvalidInput, NotFound
from smelt.models.aliases import DEFAULT, DEFAULT_NAMES, read_aliases
from smelt.models.architectures import CONFIG_FILE
from smelt.models.folders import ADAPTER_FILE, WEIGHTS_FILE
from smelt.models.hub import hub_folder

if TYPE_CHECKING:
    from smelt.data.sources import Progress

PART = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
# With its owner before it, as on the hub, or as OpenAI calls what was fine-tuned; none can lead out of a folder.
NAME = re.compile(rf"{PART}(/{PART})?|ft:[A-Za-z0-9][A-Za-z0-9._:-]{{0,199}}")
MARKS = (CONFIG_FILE, ADAPTER_FILE)  # a folder with one of these is a model, or an adapter of one
NANOGPT_FILE = "ckpt.pt"
RUN_LINKS = ("best", "last")  # what a run's folder points to, in the order of preference

# Names that everybody knows -> repositories of the hub; the older name may be the one in the cache.
HUB_OWNERS = {
    **dict.fromkeys(("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"), "openai-community"),
    "distilbert-base-uncased": "distilbert",
    "bert-base-uncased": "google-bert",
    "roberta-base": "FacebookAI",
}
HUB_NAMES = {name: (f"{owner}/{name}", name) for name, owner in HUB_OWNERS.items()}


def resolve(name_or_folder: str, models_folder: Path, progress: "Progress | None" = None) -> Path:
    """The model folder (or nanoGPT `ckpt.pt`) that a name, an alias, a path, `gpt2`... or `hf:ORG/NAME` means.

    A registered name or alias wins over a folder of the same name here: write ./NAME for the folder. `progress` hears
    of what is fetched. Raises NotFound, which lists what exists, and MissingDependency where the hub is needed but out
    of reach.
    """
    if name_or_folder.startswith("hf:"):
        return hub_folder(name_or_folder.removeprefix("hf:"), progress=progress)
    path = Path(name_or_folder).expanduser()
    is_name = is_registered(name_or_folder, models_folder) or name_or_folder in read_aliases(models_folder)
    if path.exists() and not is_name:
        return model_in(path)
    if (name := registered_name(name_or_folder, models_folder)) is not None:
        return models_folder / name
    if (hub_name := name_or_folder.replace("_", "-")) in HUB_NAMES:
        return hub_folder(*HUB_NAMES[hub_name], progress=progress)
    raise NotFound(_not_found(name_or_folder, models_folder))


def registered_name(name: str, models_folder: Path) -> str | None:
    """The registered model that a name means, also as an alias, as `gpt` or `default`, or with underscores for dashes.

    None where there is none.
    """
    if is_registered(name, models_folder):
        return name
    if NAME.fullmatch(name) is None:
        return None
    aliases = read_aliases(models_folder)
    if name in DEFAULT_NAMES:
        target = default_name(aliases, registered_names(models_folder))
    else:
        target = aliases.get(name, name.replace("_", "-"))
    return target if target is not None and is_registered(target, models_folder) else None


def default_name(aliases: dict[str, str], names: list[str]) -> str | None:
    """The default model where no server was given one: what the alias `default` says, else the only one there is."""
    return aliases.get(DEFAULT) or (names[0] if len(names) == 1 else None)


def is_registered(name: str, models_folder: Path) -> bool:
    """Whether a model of that name was imported or saved."""
    if NAME.fullmatch(name) is None or not _is_marked(models_folder / name):
        return False
    owner = owner_of(name)
    return owner is None or not _is_marked(models_folder / owner)  # else it is a part of that model


def _is_marked(folder: Path) -> bool:
    return any((folder / mark).is_file() for mark in MARKS)


def owner_of(name: str) -> str | None:
    """What stands before the slash of a name, if it has one."""
    owner, slash, _ = name.partition("/")
    return owner if slash else None


def name_at(path: Path, models_folder: Path) -> str | None:
    """The name of the registered model in a folder; None where the folder is not one."""
    if not path.absolute().is_relative_to(models_folder.absolute()):
        return None
    name = path.absolute().relative_to(models_folder.absolute()).as_posix()
    return name if is_registered(name, models_folder) else None


def registered_names(models_folder: Path) -> list[str]:
    """Names of all registered models, sorted."""
    folders = {
        path.parent for depth in ("*", "*/*") for mark in MARKS for path in models_folder.glob(f"{depth}/{mark}")
    }
    return sorted(name for folder in folders if (name := name_at(folder, models_folder)) is not None)


def check_name(name: str) -> None:
    """InvalidInput where a model cannot be called that."""
    if not NAME.fullmatch(name):
        raise InvalidInput(
            f"model name {name[:200]!r} must begin with a letter or digit and have at most 64 letters, digits, '.', "
            "'_', '-', or two such parts with a slash between them: OWNER/NAME"
        )


def model_in(path: Path) -> Path:
    """The model at a path: the folder itself, a run's best or else last checkpoint, or nanoGPT's file in it."""
    if path.is_file():
        if path.suffix == ".pt":
            return path
        raise InvalidInput(f"{path} is a file; give the model's folder, or a nanoGPT {NANOGPT_FILE}")
    for folder in (path, *(path / link for link in RUN_LINKS)):
        if _is_marked(folder):
            return folder.resolve()  # a link may move on while training goes on
    if (path / NANOGPT_FILE).is_file():
        return path / NANOGPT_FILE
    raise NotFound(
        f"{path} holds no model: neither {CONFIG_FILE} with {WEIGHTS_FILE}, nor checkpoints of a run, "
        f"nor nanoGPT's {NANOGPT_FILE}"
    )


def _not_found(name: str, models_folder: Path) -> str:
    names = registered_names(models_folder)
    close = difflib.get_close_matches(name, [*names, *read_aliases(models_folder), *HUB_NAMES], n=3)
    parts = [f"no model or folder {name!r}"]
    if name in DEFAULT_NAMES and names:
        parts.append(f"choose the default model: smelt models alias {DEFAULT} NAME")
    if close:
        parts.append(f"did you mean {' or '.join(close)}?")
    parts.append(
        f"registered models: {', '.join(names)}" if names else "no model is registered yet (smelt models import)"
    )
    return "; ".join(parts)
