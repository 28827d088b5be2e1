"""What runs have made, as models of a name, served from then on; knows no process, no HTTP and no torch."""

from pathlib import Path

from smelt.control.adapters import import_adapter
from smelt.control.models import import_model, job_of
from smelt.errors import InvalidInput
from smelt.models.folders import base_of, check_weights, is_adapter, read_config
from smelt.models.registry import model_in, name_at


def register_result(out_dir: Path, name: str, models_folder: Path, job: str) -> Path:
    """Register what a run has made (its best checkpoint, else its last) under a name, and return its folder.

    An adapter stays one, beside the model that it changes. The same job done twice, as after a crash, changes nothing.
    NotFound where the run has saved nothing, or its model is gone; AlreadyExists where the name is taken.
    """
    if job_of(name, models_folder) == job:
        return models_folder / name
    source = model_in(out_dir)
    register = register_adapter if is_adapter(source) else import_model
    return register(source, name, models_folder, str(out_dir), job=job)


def register_adapter(source: Path, name: str, models_folder: Path, origin: str, job: str | None = None) -> Path:
    """Register an adapter which a run here has made, beside the model that it changes.

    NotFound where that model is gone; InvalidInput where it is not registered, so that nobody would serve it.
    """
    base = base_of(source)
    if name_at(base, models_folder) is None:
        raise InvalidInput(
            f"the adapter changes the model in {base}, which is not registered, so it would not be served: "
            f"smelt models import {base} MODEL, then smelt adapters import {source} {name} --model MODEL"
        )
    check_weights(base, read_config(base))
    return import_adapter(source, name, base, models_folder, origin, job)
