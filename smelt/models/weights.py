"""Weights in and out: Hugging Face folders (safetensors only) and nanoGPT's `ckpt.pt`; knows no tokenizer.

Names and shapes come from `architectures`; every file is checked against its config before a tensor is used.
Reading what was written gives the same bits, so checkpoints are kept in this layout.
"""

import errno
import json
import os
import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from smelt.configs import DecoderConfig, validated
from smelt.errors import NotFound, OutOfSpace, UnsafeFile, UnsupportedModel
from smelt.models.architectures import (
    ARCHITECTURES,
    CONFIG_FILE,
    DERIVED_TENSORS,
    Shape,
    Stored,
    gpt2_layout,
    layout_of,
    read_config,
    to_hf_config,
    zero_biases_of,
)
from smelt.models.decoder import Decoder

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
SHARD_BYTES = 5 * 10**9  # what hubs and readers expect at most in one file
FLOATS = {"F64", "F32", "F16", "BF16"}

CONVERT = (
    "smelt opens no pickled weights, since they can run code. Convert them where you trust the file, with "
    "transformers: AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER, safe_serialization=True)"
)


# --- State dictionaries: ours and theirs -----------------------------------------------------------------


def to_hf_tensors(config: DecoderConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our parameters under Hugging Face's names and shapes; contiguous, each in its own dtype."""
    tensors: dict[str, Tensor] = {}
    for name, stored in layout_of(config).items():
        pieces = torch.split(state[name], [shape[0] for shape in stored.shapes])
        for theirs, piece in zip(stored.names, pieces, strict=True):
            tensors[theirs] = (piece.t() if stored.transposed else piece).contiguous()
    dtype = state["embedding.weight"].dtype
    return tensors | {name: torch.zeros(shape, dtype=dtype) for name, shape in zero_biases_of(config).items()}


def from_hf_tensors(config: DecoderConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `to_hf_tensors`. UnsupportedModel names tensors that are missing, unknown or misshapen."""
    named = _with_full_names(config, tensors)
    _check_shapes(config, {name: tuple(tensor.shape) for name, tensor in named.items()})
    for name in zero_biases_of(config):
        if name in named and named[name].any():
            raise UnsupportedModel(
                f"{name} is not zero, but {CONFIG_FILE} says that the model has no biases: remove its 'smelt' section"
            )
    if config.tied and "lm_head.weight" in named:
        embedding = named[layout_of(config)["embedding.weight"].names[0]]
        if not torch.equal(embedding, named["lm_head.weight"]):
            raise UnsupportedModel(f"lm_head.weight differs from the embedding, but {CONFIG_FILE} says they are tied")
    return {name: _gather(stored, named) for name, stored in layout_of(config).items()}


def _gather(stored: Stored, tensors: Mapping[str, Tensor]) -> Tensor:
    pieces = [tensors[name].t() if stored.transposed else tensors[name] for name in stored.names]
    return (pieces[0] if len(pieces) == 1 else torch.cat(pieces)).contiguous()


def _with_full_names(config: DecoderConfig, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Files of the bare model leave out the prefix of every name; derived buffers are dropped."""
    prefix = ARCHITECTURES[config.architecture].prefix
    is_bare = not any(name.startswith(prefix) for name in tensors)
    kept = {name: value for name, value in tensors.items() if not name.endswith(DERIVED_TENSORS)}
    if not is_bare:
        return kept
    return {name if name.startswith("lm_head.") else prefix + name: value for name, value in kept.items()}


def _check_shapes(config: DecoderConfig, found: Mapping[str, Shape]) -> None:
    expected: dict[str, Shape] = {}
    for stored in layout_of(config).values():
        for name, shape in zip(stored.names, stored.shapes, strict=True):
            expected[name] = shape[::-1] if stored.transposed else shape
    optional = set(zero_biases_of(config)) | ({"lm_head.weight"} if config.tied else set())
    missing, unknown = expected.keys() - found.keys(), found.keys() - expected.keys() - optional
    if missing or unknown:
        parts = [f"missing {_first(missing)}"] if missing else []
        parts += [f"unexpected {_first(unknown)}"] if unknown else []
        raise UnsupportedModel(f"the weights do not fit {CONFIG_FILE}: {'; '.join(parts)}")
    for name, shape in expected.items():
        if found[name] != shape:
            raise UnsupportedModel(f"{name} has shape {found[name]}, but {CONFIG_FILE} asks for {shape}")


def _first(names: Iterable[str], limit: int = 4) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:limit]) + (f" and {len(ordered) - limit} more" if len(ordered) > limit else "")


# --- Hugging Face folders --------------------------------------------------------------------------------


def read_model(
    folder: Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu", dropout: float = 0.0
) -> Decoder:
    """A decoder in eval mode from a Hugging Face folder; `dtype` None keeps what the embedding is stored in.

    On a CPU, tensors that need no conversion stay memory-mapped. Raises NotFound, UnsafeFile or UnsupportedModel.
    """
    config = read_config(folder)
    tensors = _read_tensors(folder, config)
    try:
        state = from_hf_tensors(config, tensors)
    except UnsupportedModel as error:
        raise UnsupportedModel(f"{folder}: {error}") from None
    return assemble(config, state, dtype, device, dropout)


def assemble(
    config: DecoderConfig,
    state: Mapping[str, Tensor],
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    dropout: float = 0.0,
) -> Decoder:
    """A decoder in eval mode that holds these very tensors where device and dtype allow."""
    dtype = dtype or state["embedding.weight"].dtype
    with torch.device("meta"):
        model = Decoder(config, dropout)
    model.load_state_dict({name: tensor.to(device, dtype) for name, tensor in state.items()}, assign=True)
    return model.eval()


def _read_tensors(folder: Path, config: DecoderConfig) -> dict[str, Tensor]:
    """Every tensor of a folder, lazily mapped, after its header was checked against the config."""
    tensors: dict[str, Tensor] = {}
    shapes: dict[str, Shape] = {}
    handles = [_open_safetensors(path) for path in _weight_files(folder)]
    for handle in handles:
        for name in handle.keys():  # noqa: SIM118 a safetensors handle is not a mapping
            part = handle.get_slice(name)
            if part.get_dtype() not in FLOATS and not name.endswith(DERIVED_TENSORS):
                raise UnsupportedModel(f"{folder}: {name} is stored as {part.get_dtype()}; known: {_first(FLOATS)}")
            shapes[name] = tuple(part.get_shape())
    try:
        _check_shapes(config, _with_full_names(config, shapes))
    except UnsupportedModel as error:
        raise UnsupportedModel(f"{folder}: {error}") from None
    for handle in handles:
        tensors |= {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 as above
    return tensors


def _open_safetensors(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UnsupportedModel(f"{path} is not a readable safetensors file: {error}") from None


def _weight_files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS_FILE).is_file():
        return [folder / WEIGHTS_FILE]
    if (folder / INDEX_FILE).is_file():
        return _sharded_files(folder)
    pickled = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickled:
        raise UnsafeFile(f"{folder} holds its weights as {_first(pickled)}. {CONVERT}")
    raise NotFound(f"{folder} has no {WEIGHTS_FILE}")


def _sharded_files(folder: Path) -> list[Path]:
    try:
        index = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))
        names = sorted(set(index["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UnsupportedModel(f"{folder / INDEX_FILE} is damaged: {error!r}") from None
    for name in names:
        if Path(name).name != name:
            raise UnsupportedModel(f"{folder / INDEX_FILE} names a file outside of its folder: {name!r}")
        if not (folder / name).is_file():
            raise NotFound(f"{folder} lacks {name}, which {INDEX_FILE} names")
    return [folder / name for name in names]


def write_model(
    config: DecoderConfig, state: Mapping[str, Tensor], folder: Path, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write `config.json` and safetensors that transformers reads; files are fsynced. OutOfSpace on a full disk."""
    tensors = {name: tensor.cpu() for name, tensor in to_hf_tensors(config, state).items()}
    dtype = str(state["embedding.weight"].dtype).removeprefix("torch.")
    hf = {**to_hf_config(config), "dtype": dtype, "torch_dtype": dtype}
    shards = _into_shards(tensors, shard_bytes)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write_json(hf, folder / CONFIG_FILE)
        if len(shards) == 1:
            _write_tensors(tensors, folder / WEIGHTS_FILE)
        else:
            _write_shards(shards, folder)
    except (SafetensorError, OSError) as error:
        if _is_full_disk(error):
            raise OutOfSpace(f"no space left for the model in {folder}; free some and try again") from error
        raise


def _is_full_disk(error: Exception) -> bool:
    """The safetensors library puts the system's number only into its message."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return f"os error {errno.ENOSPC}" in str(error) or f"os error {errno.EDQUOT}" in str(error)


def _into_shards(tensors: Mapping[str, Tensor], shard_bytes: int) -> list[dict[str, Tensor]]:
    """Greedy in the order of the names; a tensor larger than a shard has one of its own."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    return shards


def _write_shards(shards: list[dict[str, Tensor]], folder: Path) -> None:
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_tensors(shard, folder / file_name)
        weight_map |= dict.fromkeys(shard, file_name)
    total = sum(tensor.nbytes for shard in shards for tensor in shard.values())
    _write_json({"metadata": {"total_size": total}, "weight_map": weight_map}, folder / INDEX_FILE)


def _write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    save_file(tensors, path, metadata={"format": "pt"})
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _write_json(value: Any, path: Path) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=2)
        file.flush()
        os.fsync(file.fileno())


# --- nanoGPT ---------------------------------------------------------------------------------------------


def read_nanogpt(path: Path) -> tuple[DecoderConfig, dict[str, Tensor]]:
    """Config and state of a nanoGPT `ckpt.pt`, loaded as weights only: nothing in the file can run.

    nanoGPT computes GELU exactly, so that the config says `gelu_exact`.
    """
    checkpoint = _load_weights_only(path)
    try:
        model_args, weights = dict(checkpoint["model_args"]), dict(checkpoint["model"])
        shape = {key: model_args[key] for key in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd", "bias")}
    except (KeyError, TypeError, ValueError) as error:
        raise UnsupportedModel(f"{path} is not a nanoGPT checkpoint ({error!r} while looking for model_args)") from None
    config = validated(DecoderConfig, {**shape, "qkv_bias": shape["bias"], "mlp": "gelu_exact"})
    found = {name.removeprefix("_orig_mod."): tensor for name, tensor in weights.items()}
    state = {}
    for name, stored in gpt2_layout(config, transposed=False).items():
        source = found.get(stored.names[0])
        if not isinstance(source, Tensor) or tuple(source.shape) != stored.shapes[0]:
            held = f"shape {tuple(source.shape)}" if isinstance(source, Tensor) else "no tensor"
            raise UnsupportedModel(f"{path}: {stored.names[0]} needs shape {stored.shapes[0]}, found {held}")
        state[name] = source.contiguous()
    return config, state


def _load_weights_only(path: Path) -> Any:
    if not path.is_file():
        raise NotFound(f"checkpoint {path} does not exist")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).split("\n")[0][:200]
        raise UnsafeFile(
            f"{path} holds more than plain weights ({reason}). In a place where you trust it, keep only its tensors: "
            'c = torch.load(PATH, weights_only=False); torch.save({k: c[k] for k in ("model", "model_args")}, NEW_PATH)'
        ) from None
    except (RuntimeError, EOFError, OSError) as error:
        raise UnsupportedModel(f"{path} is not a whole torch file: {str(error).splitlines()[0]}") from None
