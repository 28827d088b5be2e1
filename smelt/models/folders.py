"""A model folder: its config, the files that hold its weights, and whether they fit; knows no names and no torch.

Only headers are read here, so a folder can be judged before a byte of its weights is used.
"""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from smelt.configs import DecoderConfig
from smelt.data.bpe import MARKER_FILE
from smelt.data.hf_tokenizer import TOKENIZER_FILE
from smelt.data.tokenizers import Tokenizer, load_tokenizer
from smelt.errors import NotFound, UnsafeFile, UnsupportedModel
from smelt.models.architectures import (
    CONFIG_FILE,
    Shape,
    check_shapes,
    compare_shapes,
    from_hf_config,
    with_full_names,
)
from smelt.models.encoder_architectures import (
    BUFFERS,
    ClassifierShape,
    classifier_file_shapes,
    classifier_shape,
    is_classifier,
    named_for,
)

WEIGHTS_FILE = "model.safetensors"
ADAPTER_FILE, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # LoRA adapters, as PEFT's are
INDEX_FILE = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
FLOATS = ("F64", "F32", "F16", "BF16")

# Names, sizes and times of files.
Stamp = tuple[tuple[str, int, int], ...]

CONVERT = (
    "smelt opens no pickled weights, since they can run code. Convert them where you trust the file, with "
    "transformers: AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER, safe_serialization=True)"
)


def stamp_of(path: Path) -> Stamp:
    """What changes when a folder's files do, or a file. OSError where it is being removed."""
    paths = list(path.iterdir()) if path.is_dir() else [path]
    stats = [(each.name, each.stat()) for each in paths]
    return tuple(sorted((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats))


def read_hf_config(folder: Path) -> dict[str, Any]:
    """`config.json` as it stands. NotFound, or UnsupportedModel where it is no JSON object."""
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise NotFound(f"{folder} has no {CONFIG_FILE}, so it is not a model folder")
    return read_json_object(path)


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter in place of a model."""
    return (folder / ADAPTER_FILE).is_file() and not (folder / CONFIG_FILE).is_file()


def base_of(path: Path) -> Path:
    """The folder with a model's config and tokenizer: its own or, for an adapter, that of the model it changes.

    NotFound where the adapter does not say which that is, or it is gone.
    """
    if not is_adapter(path):
        return path
    base = read_json_object(path / ADAPTER_FILE).get("base_model_name_or_path")
    if not isinstance(base, str) or not (Path(base) / CONFIG_FILE).is_file():
        raise NotFound(f"{path} is an adapter of the model in {base!r}, which is not there")
    return Path(base)


def adapter_rank(folder: Path) -> int | None:
    """The rank that an adapter says it has; None where it says none, or the folder holds a model."""
    rank = read_json_object(folder / ADAPTER_FILE).get("r") if is_adapter(folder) else None
    return rank if isinstance(rank, int) else None


def adapts_unembedding(settings: dict[str, Any]) -> bool:
    """Whether an adapter of these settings may change what turns hidden states into logits."""
    targets = settings.get("target_modules")
    return not isinstance(targets, list) or any(str(target).endswith("lm_head") for target in targets)


def read_config(folder: Path) -> DecoderConfig:
    """The config of a model folder. NotFound or UnsupportedModel, with the folder's name."""
    try:
        return from_hf_config(read_hf_config(folder))
    except UnsupportedModel as error:
        raise UnsupportedModel(f"{folder}: {error}") from None


def read_json(path: Path) -> Any:
    """The value in a JSON file. UnsupportedModel where it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UnsupportedModel(f"{path} is not valid JSON: {error}") from None


def read_json_object(path: Path) -> dict[str, Any]:
    """As `read_json`. UnsupportedModel where it is no object either."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise UnsupportedModel(f"{path} must hold an object, not {type(value).__name__}")
    return value


def read_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer beside the weights; None where there is none. TokenizerError where it is damaged."""
    has_one = any((folder / name).is_file() for name in (MARKER_FILE, TOKENIZER_FILE, "vocab.json", "vocab.txt"))
    return load_tokenizer(folder) if has_one else None


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder. UnsafeFile where there are only pickles, else NotFound."""
    if (folder / WEIGHTS_FILE).is_file():
        return [folder / WEIGHTS_FILE]
    if (folder / INDEX_FILE).is_file():
        return _sharded_files(folder)
    pickled = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickled:
        raise UnsafeFile(f"{folder} holds its weights as {', '.join(pickled[:4])}. {CONVERT}")
    raise NotFound(f"{folder} has no {WEIGHTS_FILE}")


def _sharded_files(folder: Path) -> list[Path]:
    index = read_json(folder / INDEX_FILE)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise UnsupportedModel(f"{folder / INDEX_FILE} has no weight_map of tensor names to file names")
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name:
            raise UnsupportedModel(f"{folder / INDEX_FILE} names a file outside of its folder: {name!r}")
        if not (folder / name).is_file():
            raise NotFound(f"{folder} lacks {name}, which {INDEX_FILE} names")
    return [folder / name for name in names]


def check_weights(folder: Path, config: DecoderConfig) -> None:
    """Compare the files' headers with the config; UnsupportedModel names what is torn, missing or misshapen."""
    shapes: dict[str, Shape] = {}
    for path in weight_files(folder):
        shapes |= _read_shapes(path)
    try:
        check_shapes(config, with_full_names(config, shapes))
    except UnsupportedModel as error:
        raise UnsupportedModel(f"{folder}: {error}") from None


def read_classifier_shape(folder: Path) -> ClassifierShape:
    """The shape and labels of a classifier's folder, or of an encoder that can become one.

    NotFound or UnsupportedModel, with the folder's name.
    """
    try:
        return classifier_shape(read_hf_config(folder))
    except UnsupportedModel as error:
        raise UnsupportedModel(f"{folder}: {error}") from None


def classifier_in(folder: Path) -> ClassifierShape | None:
    """The shape of a folder whose model says labels, or could learn to; None where it writes text instead.

    NotFound or UnsupportedModel, with the folder's name.
    """
    return read_classifier_shape(folder) if is_classifier(read_hf_config(folder)) else None


def check_model(folder: Path) -> None:
    """UnsupportedModel where the weights of a folder, of whatever kind, do not fit its config."""
    shape = classifier_in(folder)
    if shape is None:
        check_weights(folder, read_config(folder))
    else:
        check_classifier(folder, shape)


def check_classifier(folder: Path, shape: ClassifierShape) -> None:
    """Compare the files' headers with a classifier's shape; UnsupportedModel as `check_weights`."""
    found: dict[str, Shape] = {}
    for path in weight_files(folder):
        found |= _read_shapes(path)
    expected, optional = classifier_file_shapes(shape)
    try:
        compare_shapes(expected, named_for(shape, found), optional.keys())
    except UnsupportedModel as error:
        raise UnsupportedModel(f"{folder}: {error}") from None


def _read_shapes(path: Path) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {}
    try:
        with safe_open(path, framework="np") as file:
            for name in file.keys():  # noqa: SIM118 the handle is not a mapping
                part = file.get_slice(name)
                if part.get_dtype() not in FLOATS and not name.endswith(BUFFERS):
                    raise UnsupportedModel(
                        f"{path}: {name} is stored as {part.get_dtype()}; supported: {', '.join(FLOATS)}"
                    )
                shapes[name] = tuple(part.get_shape())
    except (SafetensorError, OSError) as error:
        raise UnsupportedModel(f"{path} is not a readable safetensors file: {error}") from None
    return shapes
