"""The Python interface: what `import smelt` offers, with settings applied; torch is imported when it is needed."""

from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from smelt.errors import TokenizerError, UnsupportedModel
from smelt.run_configs import RunConfig, config_of, newest_checkpoint, out_dir_of, resumed_values
from smelt.settings import load_settings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from smelt.data.datasets import Dataset
    from smelt.data.sources import Progress
    from smelt.inference.classifier import TextClassifier
    from smelt.inference.service import TextModel
    from smelt.training.metrics import RunSummary, Sink
    from smelt.training.scoring import Score


def load(
    name_or_folder: str, device: str | None = None, dtype: str | None = None, quantize: str | None = None
) -> "TextModel":
    """A model that writes text: a registered name, a model folder, a run's out_dir, `gpt2`... or `hf:ORG/NAME`.

    `device` and `dtype` None: as `smelt.yaml` or SMELT_DEVICE and SMELT_DTYPE say, else the fastest that is safe.
    `quantize` "int8" rounds the weights: about twice the speed of bf16 for one answer at a time on a CPU.
    Raises NotFound, UnsupportedModel, UnsafeFile, MissingDependency, or TokenizerError where it has no tokenizer.
    """
    import torch

    from smelt.data.chat_format import ChatFormat
    from smelt.inference.service import TextModel
    from smelt.models import quantization
    from smelt.models.devices import pick_device, pick_dtype
    from smelt.models.folders import base_of, classifier_in
    from smelt.models.kernels import start_build
    from smelt.models.loading import load_model
    from smelt.models.registry import resolve

    settings = load_settings(device=device, dtype=dtype, quantize=quantize)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    path = resolve(str(name_or_folder), settings.models)
    if path.is_dir() and classifier_in(base_of(path)) is not None:
        raise UnsupportedModel(f"{name_or_folder} is a classifier, which writes no text; serve it: smelt serve {path}")
    place = pick_device(settings.device)
    if place.type == "cpu":
        start_build(settings.kernels)
    model, tokenizer = load_model(path, pick_dtype(settings.dtype, place), place)
    if tokenizer is None:
        raise TokenizerError(f"{path} has no tokenizer; put its tokenizer.json beside the weights")
    model = quantization.quantize(model, settings.quantize)
    return TextModel(
        model, tokenizer, settings.max_running, settings.kv_cache_bytes, ChatFormat.of(base_of(path), tokenizer)
    )


def load_classifier(name_or_folder: str, device: str | None = None, dtype: str | None = None) -> "TextClassifier":
    """A model that says which label a text has; named as in `load`, which also says the other arguments.

    Raises what `load` raises.
    """
    import torch

    from smelt.inference.classifier import TextClassifier
    from smelt.models.devices import pick_device, pick_dtype
    from smelt.models.kernels import start_build
    from smelt.models.loading import load_classifier as load_parts
    from smelt.models.registry import resolve

    settings = load_settings(device=device, dtype=dtype)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    place = pick_device(settings.device)
    if place.type == "cpu":
        start_build(settings.kernels)
    path = resolve(str(name_or_folder), settings.models)
    return TextClassifier(*load_parts(path, pick_dtype(settings.dtype, place), place))


def train(config: RunConfig | dict[str, Any] | None = None, **fields: Any) -> "RunSummary":
    """Train as a config says, or a dict of its fields, or keyword arguments; these win over the config.

    The key `recipe` says what is trained: "pretrain" without one. Raises ConfigError before anything is computed; see
    TrainConfig, and the other classes of `smelt.run_configs`, for the fields.
    """
    given = dict(config or {}) if not isinstance(config, RunConfig) else given_fields(config)
    return run(run_config(given | fields))


def given_fields(config: RunConfig) -> dict[str, Any]:
    """A config's recipe and the fields that were set, for others to go on top of."""
    return {"recipe": config.recipe, **config.model_dump(exclude_unset=True)}


def run(config: RunConfig, sinks: "Sequence[Sink]" = (), progress: "Progress | None" = None) -> "RunSummary":
    """Train by a complete config, and let the run be found by every command and page of this home folder.

    `progress` hears about the preparation of data. Raises what the config's recipe raises.
    """
    from smelt.control.run_folders import register
    from smelt.models.devices import pick_device
    from smelt.models.kernels import start_build
    from smelt.training.recipes import RECIPES
    from smelt.training.run_setup import no_progress

    settings = load_settings()
    started = partial(register, runs_folder=settings.runs)
    if config.recipe == "classify" and pick_device(config.device).type == "cpu":
        start_build(settings.kernels)  # of attention within texts, and of tables of which few rows are looked up
    recipe = RECIPES[config.recipe]
    return recipe(config, settings.datasets, settings.models, sinks, progress or no_progress, started)


def run_config(values: dict[str, Any]) -> RunConfig:
    """The config of a run: on resume over the saved one, with this machine's settings where it says nothing."""
    settings = load_settings()
    machine = {name: getattr(settings, name) for name in ("device", "dtype", "threads")}
    if values.get("init_from") == "resume":
        return config_of({**machine, **resumed_values(values)})
    config = config_of({**machine, **values})
    out_dir = out_dir_of(config)
    if config.resume_if_begun and newest_checkpoint(out_dir) is not None:
        return run_config({**values, "init_from": "resume", "out_dir": str(out_dir)})
    return config


def evaluate(
    name_or_folder: str,
    data: str,
    *,
    split: Literal["train", "val"] = "val",
    max_length: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    progress: "Progress | None" = None,
    **loading: Any,
) -> "Score":
    """How well a model predicts a file's texts or answers, or a dataset's split: loss, perplexity, bits per byte.

    `max_length` None: the model's context. `limit`: so many examples, the first ones. `loading`: device and dtype,
    as `load` takes them. Raises what `load` raises, and DataError, NotFound, InvalidInput or NotEnoughData.
    """
    from smelt.training.fine_tuning import located_examples
    from smelt.training.run_setup import no_progress
    from smelt.training.scoring import samples_to_score, score

    settings = load_settings()
    model = load(name_or_folder, quantize="none", **loading)
    examples = located_examples(data, split, settings.datasets)[:limit]
    samples = samples_to_score(examples, model.config, model.tokenizer, model.chat_format, max_length)
    return score(model.model, model.tokenizer, samples, batch_size, progress or no_progress)


def prepare_data(
    source: str,
    name: str | None = None,
    *,
    tokenizer: str = "bpe:4096",
    val_fraction: float = 0.1,
    block_size: int = 128,
    column: str = "text",
) -> "Dataset":
    """Tokenize a file, a folder, a URL, `hf:ORG/NAME` or `builtin:pydoc` for training.

    With a name it becomes a dataset of that name, and the name must be free. Without one it is made once and found
    again by `train(data_path=source)` while the source, the tokenizer and the fraction stay the same. Raises what
    `smelt.data.preparation.prepare` raises.
    """
    from smelt.data.preparation import PrepareOptions, dataset_for, prepare

    datasets_folder = load_settings().datasets
    options = PrepareOptions(val_fraction=val_fraction, block_size=block_size, column=column)
    if name is None:
        return dataset_for(source, datasets_folder, tokenizer=tokenizer, options=options)
    return prepare(source, datasets_folder, name, tokenizer=tokenizer, options=options)
