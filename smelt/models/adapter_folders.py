"""LoRA adapters in PEFT's layout, read and written; knows no model that runs and no batch.

`adapter_config.json` says how they scale, `adapter_model.safetensors` holds two factors per matrix under Hugging
Face's names. Ours are grouped by the fused matrix they belong to.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from smelt.configs import DecoderConfig
from smelt.errors import NotFound, UnknownAdapter, UnsafeFile, UnsupportedModel
from smelt.models.architectures import Stored, layout_of
from smelt.models.folders import ADAPTER_FILE, ADAPTER_WEIGHTS, read_json_object
from smelt.models.tensor_file import Pause, no_pause, write_tensors

PREFIX = "base_model.model."  # PEFT's name for the model it wraps
UNEMBEDDING = "head"  # the matrix that turns hidden states into logits, also where it is the embedding again
MAX_RANK = 1024
# What other kinds of adapters set, and the value that means plain LoRA.
PLAIN = {
    "peft_type": "LORA",
    "bias": "none",
    "use_dora": False,
    "lora_bias": False,
    "modules_to_save": None,
    "trainable_token_indices": None,
    "target_parameters": None,
    "layer_replication": None,
    "alora_invocation_tokens": None,
    "use_bdlora": None,
    "use_qalora": False,
    "arrow_config": None,
}


class Factors(NamedTuple):
    """What is added to a matrix W (out, in): scale B A, with A (rank, in) and B (out, rank)."""

    a: Tensor
    b: Tensor
    scale: float


# Of each fused matrix, by its parameter's name without ".weight", the factors of its parts; None: unchanged.
Adapter = dict[str, tuple[Factors | None, ...]]


@dataclass(frozen=True, slots=True)
class Matrix:
    """A fused matrix that adapters may change: what its parts are called elsewhere, and how many rows each has."""

    names: tuple[str, ...]
    num_rows: tuple[int, ...]
    width: int


def matrices_of(config: DecoderConfig) -> dict[str, Matrix]:
    """All matrices within the blocks of such a model, by our names without ".weight", and the unembedding."""
    within = {
        name.removesuffix(".weight"): _matrix(stored)
        for name, stored in layout_of(config).items()
        if name.startswith("blocks.") and name.endswith(".weight") and len(stored.shapes[0]) == 2
    }
    return {**within, UNEMBEDDING: Matrix(("lm_head",), (config.vocab_size,), config.n_embd)}


def part_of(name: str) -> str:
    """Which part of a model a matrix belongs to: "attention", "mlp", or the unembedding, "head"."""
    return name if name == UNEMBEDDING else name.split(".")[2]


def _matrix(stored: Stored) -> Matrix:
    names = tuple(name.removesuffix(".weight") for name in stored.names)
    return Matrix(names, tuple(shape[0] for shape in stored.shapes), stored.shapes[0][1])


def read_adapter(folder: Path, config: DecoderConfig) -> Adapter:
    """The adapter in a folder, for a model of this shape; its tensors as they are stored.

    NotFound where there is none; UnsupportedModel names what does not fit the model, or is no plain LoRA.
    """
    settings = _read_settings(folder)
    tensors = _read_tensors(folder)
    adapter: Adapter = {}
    for ours, matrix in matrices_of(config).items():
        named = zip(matrix.names, matrix.num_rows, strict=True)
        parts = tuple(_take(tensors, name, num_rows, matrix.width, settings) for name, num_rows in named)
        if any(parts):
            adapter[ours] = parts
    _drop_frozen_unembedding(tensors, config)
    if tensors:
        raise UnsupportedModel(f"{folder}: {min(tensors)} belongs to nothing that an adapter of this model can change")
    if not adapter:
        raise UnsupportedModel(f"{folder}: {ADAPTER_WEIGHTS} holds no LoRA factors")
    return adapter


def adapter_stamp(folder: Path) -> int:
    """What changes when the adapter in a folder does. UnknownAdapter where there is none."""
    try:
        return (folder / ADAPTER_WEIGHTS).stat().st_mtime_ns
    except OSError:
        raise UnknownAdapter(f"there is no adapter {folder.name!r}") from None


def write_adapter(
    adapter: Adapter, config: DecoderConfig, folder: Path, base: str | None = None, pause: Pause = no_pause
) -> None:
    """Write a folder that `peft` and `read_adapter` read. All factors must have one rank and one scale.

    `base`: where the model is that they belong to.
    """
    changed = [factors for parts in adapter.values() for factors in parts if factors is not None]
    ranks, scales = {len(factors.a) for factors in changed}, {factors.scale for factors in changed}
    assert len(ranks) == len(scales) == 1, "an adapter is made with one rank and one scale"
    tensors: dict[str, Tensor] = {}
    targets: set[str] = set()
    matrices = matrices_of(config)
    for ours, parts in adapter.items():
        for name, factors in zip(matrices[ours].names, parts, strict=True):
            if factors is not None:
                tensors[f"{PREFIX}{name}.lora_A.weight"] = factors.a
                tensors[f"{PREFIX}{name}.lora_B.weight"] = factors.b
                targets.add(name.rpartition(".")[2])
    rank, scale = ranks.pop(), scales.pop()
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": scale * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(targets),
        "fan_in_fan_out": config.architecture == "gpt2",
        "inference_mode": True,
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(tensors, folder / ADAPTER_WEIGHTS, pause)
    (folder / ADAPTER_FILE).write_text(json.dumps(settings, indent=2), encoding="utf-8")


def merged(
    state: Mapping[str, Tensor], adapter: Adapter, config: DecoderConfig
) -> tuple[DecoderConfig, dict[str, Tensor]]:
    """Config and parameters of a model that needs no adapter any more: W + scale B A, computed in fp32.

    An unembedding that was the embedding again is one of its own where the adapter changes it.
    """
    out = dict(state)
    matrices = matrices_of(config)
    if config.tied and UNEMBEDDING in adapter:
        config = config.replace(tied=False)
        state = {**state, f"{UNEMBEDDING}.weight": state["embedding.weight"]}
    for ours, parts in adapter.items():
        weight = state[f"{ours}.weight"]
        changed = torch.split(weight.float(), list(matrices[ours].num_rows))
        rows = [
            w if f is None else w + f.scale * f.b.float() @ f.a.float() for w, f in zip(changed, parts, strict=True)
        ]
        out[f"{ours}.weight"] = torch.cat(rows).to(weight.dtype)
    return config, out


def _read_settings(folder: Path) -> dict[str, Any]:
    path = folder / ADAPTER_FILE
    if not path.is_file():
        raise NotFound(f"{folder} has no {ADAPTER_FILE}, so it is not an adapter's folder")
    settings = read_json_object(path)
    for name, plain in PLAIN.items():
        if settings.get(name, plain) not in (plain, None, [], {}):
            raise UnsupportedModel(f"{path}: {name} {settings[name]!r} is not supported, only plain LoRA")
    return settings


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    path = folder / ADAPTER_WEIGHTS
    if not path.is_file():
        if (folder / "adapter_model.bin").is_file():
            raise UnsafeFile(
                f"{folder} holds its weights as a pickle, which can run code; save it as {ADAPTER_WEIGHTS}"
            )
        raise NotFound(f"{folder} has no {ADAPTER_WEIGHTS}")
    try:
        return {name.removeprefix(PREFIX): tensor for name, tensor in load_file(path).items()}
    except SafetensorError as error:
        raise UnsupportedModel(f"{path} is damaged: {error}") from None


def _drop_frozen_unembedding(tensors: dict[str, Tensor], config: DecoderConfig) -> None:
    """PEFT writes down what an adapted unembedding stands on, though it never changes; one that was resized stays."""
    name = "lm_head.base_layer.weight"
    if name in tensors and tensors[name].shape == (config.vocab_size, config.n_embd):
        del tensors[name]


def _take(tensors: dict[str, Tensor], name: str, num_rows: int, width: int, settings: dict[str, Any]) -> Factors | None:
    """The factors for a matrix of theirs, taken out of the tensors."""
    a, b = (tensors.pop(f"{name}.lora_{factor}.weight", None) for factor in "AB")
    if a is None and b is None:
        return None
    if a is None or b is None:
        raise UnsupportedModel(f"the adapter has only one of the two factors of {name}")
    if a.dim() != 2 or not 1 <= len(a) <= MAX_RANK or a.shape[1] != width or b.shape != (num_rows, len(a)):
        raise UnsupportedModel(
            f"the adapter's factors of {name} have shapes {tuple(a.shape)} and {tuple(b.shape)}, but the model needs "
            f"(rank, {width}) and ({num_rows}, rank), with a rank up to {MAX_RANK}"
        )
    return Factors(a, b, _scale(settings, name, len(a)))


def _scale(settings: dict[str, Any], name: str, rank: int) -> float:
    alpha = settings.get("lora_alpha", 8)
    for pattern, value in (settings.get("alpha_pattern") or {}).items():
        if not re.fullmatch(r"[\w.]+", pattern):
            raise UnsupportedModel(f"alpha_pattern {pattern!r} is not supported: only names of modules are")
        if name == pattern or name.endswith(f".{pattern}"):
            alpha = value
            break
    return float(alpha) / (math.sqrt(rank) if settings.get("use_rslora") else rank)
