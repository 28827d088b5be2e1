"""Weights in and out: Hugging Face folders (safetensors only) and nanoGPT's `ckpt.pt`; knows no tokenizer.

Names and shapes come from `architectures`; every file is checked against its config before a tensor is used.
Reading what was written gives the same bits, so checkpoints are kept in this layout.
"""

import json
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from smelt.configs import DecoderConfig, validated
from smelt.disk import is_full, read_ahead
from smelt.errors import NotFound, OutOfSpace, UnsafeFile, UnsupportedModel
from smelt.models.architectures import (
    CONFIG_FILE,
    HfConfig,
    Layout,
    Stored,
    check_shapes,
    gpt2_layout,
    layout_of,
    to_hf_config,
    with_full_names,
    zero_biases_of,
)
from smelt.models.decoder import Decoder
from smelt.models.folders import INDEX_FILE, WEIGHTS_FILE, check_weights, read_config, weight_files
from smelt.models.tensor_file import Pause, no_pause, write_tensors

SHARD_BYTES = 5 * 10**9  # what hubs and readers expect at most in one file

# --- State dictionaries: ours and theirs -----------------------------------------------------------------


def to_hf_tensors(config: DecoderConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our parameters under Hugging Face's names and shapes: views of ours, each in its own dtype."""
    tensors = to_stored(layout_of(config), state)
    dtype = state["embedding.weight"].dtype
    return tensors | {name: torch.zeros(shape, dtype=dtype) for name, shape in zero_biases_of(config).items()}


def to_stored(layout: Layout, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our parameters under the names and shapes of a layout: views of ours."""
    tensors: dict[str, Tensor] = {}
    for name, stored in layout.items():
        pieces = torch.split(state[name], [shape[0] for shape in stored.shapes])
        for theirs, piece in zip(stored.names, pieces, strict=True):
            tensors[theirs] = piece.t() if stored.transposed else piece
    return tensors


def from_hf_tensors(
    config: DecoderConfig,
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, Tensor]:
    """The inverse of `to_hf_tensors`, each tensor made at once in its place and `dtype` (None: as stored).

    UnsupportedModel names tensors that are missing, unknown or misshapen.
    """
    named = with_full_names(config, tensors)
    check_shapes(config, {name: tuple(tensor.shape) for name, tensor in named.items()})
    for name in zero_biases_of(config):
        if name in named and named[name].any():
            raise UnsupportedModel(
                f"{name} is not zero, but {CONFIG_FILE} says that the model has no biases: remove its 'smelt' section"
            )
    if config.tied and "lm_head.weight" in named:
        embedding = named[layout_of(config)["embedding.weight"].names[0]]
        if not torch.equal(embedding, named["lm_head.weight"]):
            raise UnsupportedModel(f"lm_head.weight differs from the embedding, but {CONFIG_FILE} says they are tied")
    return {name: gather(stored, named, dtype, device) for name, stored in layout_of(config).items()}


def gather(
    stored: Stored, tensors: Mapping[str, Tensor], dtype: torch.dtype | None, device: torch.device | str
) -> Tensor:
    """One tensor of ours: theirs as it is mapped, where nothing needs changing, else one copy that does it all."""
    pieces = [tensors[name].t() if stored.transposed else tensors[name] for name in stored.names]
    dtype = dtype or pieces[0].dtype
    if len(pieces) == 1:
        return pieces[0].to(device, dtype).contiguous()
    gathered = torch.empty((sum(map(len, pieces)), *pieces[0].shape[1:]), dtype=dtype, device=device)
    for part, piece in zip(torch.split(gathered, [len(piece) for piece in pieces]), pieces, strict=True):
        part.copy_(piece)
    return gathered


# --- Hugging Face folders --------------------------------------------------------------------------------


def read_model(folder: Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Decoder:
    """A decoder in eval mode from a Hugging Face folder; `dtype` None keeps what the embedding is stored in.

    On a CPU, tensors that need no conversion stay memory-mapped. Raises NotFound, UnsafeFile or UnsupportedModel.
    """
    config = read_config(folder)
    tensors = read_tensors(folder, config)
    try:
        state = from_hf_tensors(config, tensors, dtype or _dtype_of(config, tensors), device)
    except UnsupportedModel as error:
        raise UnsupportedModel(f"{folder}: {error}") from None
    return assemble(config, state, dtype, device)


def assemble(
    config: DecoderConfig,
    state: Mapping[str, Tensor],
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> Decoder:
    """A decoder in eval mode that holds these very tensors where device and dtype allow."""
    dtype = dtype or state["embedding.weight"].dtype
    with torch.device("meta"), _NoInitialValues():
        model = Decoder(config)
    model.load_state_dict({name: tensor.to(device, dtype) for name, tensor in state.items()}, assign=True)
    return model.eval()


class _NoInitialValues(TorchFunctionMode):
    """Modules that are made get none: random values for tensors without memory would import torch's compiler."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Leave out what `torch.nn.init` does."""
        if getattr(func, "__module__", None) == nn.init.__name__:
            return kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def read_tensors(folder: Path, config: DecoderConfig) -> dict[str, Tensor]:
    """Every tensor of a folder, lazily mapped, after the headers were checked against the config."""
    check_weights(folder, config)
    tensors: dict[str, Tensor] = {}
    for path in weight_files(folder):
        read_ahead(path)
        tensors |= load_file(path)
    return tensors


def _dtype_of(config: DecoderConfig, tensors: Mapping[str, Tensor]) -> torch.dtype | None:
    """What the embedding is stored in, where there is one; whoever looks for it next says so if there is none."""
    named = with_full_names(config, tensors)
    embedding = named.get(layout_of(config)["embedding.weight"].names[0])
    return None if embedding is None else embedding.dtype


def write_model(
    config: DecoderConfig,
    state: Mapping[str, Tensor],
    folder: Path,
    shard_bytes: int = SHARD_BYTES,
    pause: Pause = no_pause,
) -> None:
    """Write `config.json` and safetensors that transformers reads; files are fsynced. OutOfSpace on a full disk."""
    tensors = to_hf_tensors(config, state)
    write_folder(to_hf_config(config), tensors, state["embedding.weight"].dtype, folder, shard_bytes, pause)


def write_folder(
    hf: HfConfig,
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype,
    folder: Path,
    shard_bytes: int = SHARD_BYTES,
    pause: Pause = no_pause,
) -> None:
    """Write a `config.json`, which gets the dtype, and the tensors beside it; see `write_model`."""
    named = str(dtype).removeprefix("torch.")
    hf = {**hf, "dtype": named, "torch_dtype": named}
    shards = _into_shards(tensors, shard_bytes)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write_json(hf, folder / CONFIG_FILE)
        if len(shards) == 1:
            write_tensors(tensors, folder / WEIGHTS_FILE, pause)
        else:
            _write_shards(shards, folder, pause)
    except OSError as error:
        if is_full(error):
            raise OutOfSpace(f"no space left for the model in {folder}; free some and try again") from error
        raise


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


def _write_shards(shards: list[dict[str, Tensor]], folder: Path, pause: Pause) -> None:
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_tensors(shard, folder / file_name, pause)
        weight_map |= dict.fromkeys(shard, file_name)
    total = sum(tensor.nbytes for shard in shards for tensor in shard.values())
    _write_json({"metadata": {"total_size": total}, "weight_map": weight_map}, folder / INDEX_FILE)


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
