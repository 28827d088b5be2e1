"""Adapters beside the models that they change: registered from PEFT's folders, listed, removed; knows no torch.

A registered adapter is a model wherever one is named: it is served with the model that it stands on.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from smelt.control.models import ModelInfo, list_models, new_model, remove_model
from smelt.errors import InvalidInput, NotFound, SmeltError
from smelt.models.folders import (
    ADAPTER_FILE,
    ADAPTER_WEIGHTS,
    adapter_rank,
    adapts_unembedding,
    base_of,
    is_adapter,
    read_json_object,
)
from smelt.models.registry import is_registered, name_at, registered_name
from smelt.storage.records import SavedWeights, TrainingModel

WEIGHTS_NAME = "adapter"  # of a registered adapter's weights: tinker://NAME/sampler_weights/adapter


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """What is known of a registered adapter; `base` is None where the model that it changes is gone."""

    model: ModelInfo
    base: str | None
    rank: int | None


def base_for(model: str, models_folder: Path) -> Path:
    """The folder of a registered model that adapters may stand on. NotFound, InvalidInput."""
    name = registered_name(model, models_folder)
    if name is None:
        raise NotFound(
            f"no registered model {model!r}: an adapter is served with one, so register it first: "
            f"smelt models import {model} NAME"
        )
    if is_adapter(models_folder / name):
        raise InvalidInput(f"{name!r} is an adapter itself; name the model that it changes")
    return models_folder / name


def import_adapter(
    source: Path, name: str, base: Path, models_folder: Path, origin: str | None = None, job: str | None = None
) -> Path:
    """Register the adapter of a folder under a name, and return its folder. AlreadyExists, NotFound.

    Whether it fits the model in `base` was looked at before. `origin` (the folder) and `job` are as in `new_model`.
    """
    settings = read_json_object(source / ADAPTER_FILE)
    with new_model(name, models_folder, origin or str(source), job) as folder:
        shutil.copyfile(source / ADAPTER_WEIGHTS, folder / ADAPTER_WEIGHTS)
        told = json.dumps({**settings, "base_model_name_or_path": str(base)}, indent=2)
        (folder / ADAPTER_FILE).write_text(told, encoding="utf-8")
    return models_folder / name


def list_adapters(models_folder: Path) -> list[AdapterInfo]:
    """Every registered adapter by name, those that fine-tuning has made too."""
    return [_described(info, models_folder) for info in list_models(models_folder) if is_adapter(info.folder)]


def trained_as(name: str, models_folder: Path) -> tuple[TrainingModel, SavedWeights] | None:
    """A registered adapter as if a session had trained and saved it; None where there is none of that name.

    Its session has no id, and everybody may read it, as every registered model.
    """
    if not is_registered(name, models_folder) or not is_adapter(models_folder / name):
        return None
    settings = read_json_object(models_folder / name / ADAPTER_FILE)
    base, rank = name_at(base_of(models_folder / name), models_folder), adapter_rank(models_folder / name)
    if base is None or rank is None:
        return None
    model = TrainingModel(
        owner="", id=name, session_id="", number=0, base_model=base, served_model=base, rank=rank,
        train_unembed=adapts_unembedding(settings),
    )  # fmt: skip
    weights = SavedWeights(
        owner="", model_id=name, type="sampler_weights", name=WEIGHTS_NAME, folder=f"{models_folder.name}/{name}",
        future_id=None, is_public=True,
    )  # fmt: skip
    return model, weights


def remove_adapter(name: str, models_folder: Path) -> None:
    """Delete a registered adapter; the model that it changes stays. NotFound, InvalidInput."""
    if registered_name(name, models_folder) == name and not is_adapter(models_folder / name):
        raise InvalidInput(f"{name!r} is a model and no adapter; remove it with: smelt models rm {name}")
    remove_model(name, models_folder)


def _described(info: ModelInfo, models_folder: Path) -> AdapterInfo:
    try:
        rank, base = adapter_rank(info.folder), base_of(info.folder)
    except SmeltError:
        return AdapterInfo(info, None, None)
    return AdapterInfo(info, name_at(base, models_folder) or str(base), rank)
