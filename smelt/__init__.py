"""smelt: raw data in, served models out. The names below load on first use, so that importing is cheap."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
__all__ = ["TextModel", "TrainConfig", "evaluate", "load", "load_classifier", "prepare_data", "train"]

_HOMES = {
    "TextModel": "smelt.inference.service",
    "TrainConfig": "smelt.run_configs",
    "evaluate": "smelt.library",
    "load": "smelt.library",
    "load_classifier": "smelt.library",
    "prepare_data": "smelt.library",
    "train": "smelt.library",
}


def __getattr__(name: str) -> Any:
    """Import the module behind a public name when it is first asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module 'smelt' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
