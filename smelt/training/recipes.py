"""Recipes by name: each takes a config of its class in `run_configs`, and returns when the run has ended."""

from collections.abc import Callable

from smelt.training.classifying import classify
from smelt.training.fine_tuning import fine_tune
from smelt.training.metrics import RunSummary
from smelt.training.pretraining import pretrain

# (config, datasets folder, models folder, sinks, progress, started) -> how the run ended
RECIPES: dict[str, Callable[..., RunSummary]] = {"pretrain": pretrain, "fine-tune": fine_tune, "classify": classify}
