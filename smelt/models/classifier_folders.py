"""Classifiers in and out of Hugging Face's folders: encoders, decoders with a head, and either without one yet.

Names and shapes come from `encoder_architectures`; files are checked against the config before a tensor is used. Knows
no tokenizer.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from smelt.models.classifier import Classifier
from smelt.models.encoder_architectures import (
    ClassifierShape,
    classifier_file_shapes,
    classifier_hf_config,
    classifier_layout,
    named_for,
)
from smelt.models.folders import check_classifier, read_classifier_shape, weight_files
from smelt.models.tensor_file import Pause, no_pause
from smelt.models.weights import gather, to_stored, write_folder

EMBEDDING = "backbone.embedding.weight"
HEAD = ("dense.", "out.")  # what a model that was trained for something else has not


def read_classifier(
    folder: Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu", dropout: float = 0.0
) -> Classifier:
    """A classifier with labels, in eval mode; `dtype` None keeps what the embedding is stored in.

    Raises NotFound, UnsafeFile or UnsupportedModel.
    """
    shape = read_classifier_shape(folder)
    return assemble_classifier(shape, read_classifier_state(folder, shape), dtype, device, dropout)


def read_classifier_state(folder: Path, shape: ClassifierShape) -> dict[str, Tensor]:
    """Our parameters of a folder, as they are stored, after the files' headers were checked."""
    check_classifier(folder, shape)
    tensors: dict[str, Tensor] = {}
    for path in weight_files(folder):
        tensors |= load_file(path)
    named = named_for(shape, tensors)
    return {name: gather(stored, named, None, "cpu") for name, stored in classifier_layout(shape).items()}


def assemble_classifier(
    shape: ClassifierShape,
    state: Mapping[str, Tensor],
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    dropout: float = 0.0,
) -> Classifier:
    """A classifier in eval mode that holds these tensors; `state` may lack the head, to be initialized then."""
    model = Classifier(shape, dropout)
    result = model.load_state_dict(dict(state), strict=False)
    assert not result.unexpected_keys, "a state of a shape is of its layout"
    assert all(name.startswith(HEAD) for name in result.missing_keys), "only a head may be lacking"
    return model.to(device, dtype or state[EMBEDDING].dtype).eval()


def write_classifier(
    shape: ClassifierShape, state: Mapping[str, Tensor], folder: Path, pause: Pause = no_pause
) -> None:
    """Write `config.json` with the labels, and safetensors that transformers reads. OutOfSpace on a full disk."""
    tensors = to_stored(classifier_layout(shape), state)
    _, optional = classifier_file_shapes(shape)
    dtype = state[EMBEDDING].dtype
    tensors |= {name: torch.zeros(size, dtype=dtype) for name, size in optional.items()}
    write_folder(classifier_hf_config(shape), tensors, dtype, folder, pause=pause)
