"""The Python interface: what `import smelt` offers, with settings applied; torch is imported when it is needed."""

from typing import TYPE_CHECKING, Any

from smelt.configs import TrainConfig, validated
from smelt.errors import TokenizerError
from smelt.settings import load_settings

if TYPE_CHECKING:
    from smelt.inference.service import TextModel
    from smelt.training.metrics import RunSummary


def load(name_or_folder: str, device: str | None = None, dtype: str | None = None) -> "TextModel":
    """A model that writes text: a registered name, a model folder, a run's out_dir, `gpt2`... or `hf:ORG/NAME`.

    `device` and `dtype` None: as `smelt.yaml` or SMELT_DEVICE and SMELT_DTYPE say, else the fastest that is safe.
    Raises NotFound, UnsupportedModel, UnsafeFile, MissingDependency, or TokenizerError where it has no tokenizer.
    """
    import torch

    from smelt.inference.service import TextModel
    from smelt.models.devices import pick_device, pick_dtype
    from smelt.models.loading import load_model
    from smelt.models.registry import resolve

    settings = load_settings(device=device, dtype=dtype)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    path = resolve(str(name_or_folder), settings.models)
    place = pick_device(settings.device)
    model, tokenizer = load_model(path, pick_dtype(settings.dtype, place), place)
    if tokenizer is None:
        raise TokenizerError(f"{path} has no tokenizer; put its tokenizer.json beside the weights")
    return TextModel(model, tokenizer)


def train(config: TrainConfig | dict[str, Any] | None = None, **fields: Any) -> "RunSummary":
    """Train as a config says, or a dict of its fields, or keyword arguments; these win over the config.

    Raises ConfigError before anything is computed; see TrainConfig for the fields.
    """
    from smelt.training.recipes import pretrain, resumed_values

    given = config.model_dump(exclude_unset=True) if isinstance(config, TrainConfig) else dict(config or {})
    values = given | fields
    if values.get("init_from") == "resume":
        values = resumed_values(values)
    settings = load_settings()
    for name in ("device", "dtype", "threads"):
        values.setdefault(name, getattr(settings, name))
    return pretrain(validated(TrainConfig, values), settings.datasets, settings.models)
