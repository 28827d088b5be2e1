"""A model ready to use, with its tokenizer, from whatever `registry.resolve` found; knows no names."""

from pathlib import Path

import torch

from smelt.configs import DecoderConfig
from smelt.data.characters import read_meta_pickle
from smelt.data.text_ids import TextIds
from smelt.data.tokenizers import Tokenizer, make_tokenizer
from smelt.errors import InvalidInput, TokenizerError
from smelt.models.adapter_folders import merged, read_adapter
from smelt.models.classifier import Classifier
from smelt.models.classifier_folders import read_classifier
from smelt.models.decoder import Decoder
from smelt.models.encoder_architectures import ClassifierShape, NgramConfig
from smelt.models.folders import base_of, read_classifier_shape, read_tokenizer
from smelt.models.weights import assemble, read_model, read_nanogpt, write_model

GPT2_VOCAB_SIZES = (50257, 50304)  # nanoGPT rounds up to a multiple of 64
META_FILE = "meta.pkl"


def load_model(
    path: Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> tuple[Decoder, Tokenizer | None]:
    """Decoder in eval mode and tokenizer of a model folder or a nanoGPT `ckpt.pt`; `dtype` None: as stored.

    Of an adapter's folder: the model that it changes, with the adapter in its weights.
    """
    if path.is_file():
        config, state = read_nanogpt(path)
        return assemble(config, state, dtype, device), nanogpt_tokenizer(path, config)
    base = base_of(path)
    model = read_model(base, dtype, device)
    if base != path:
        model = assemble(*merged(model.state_dict(), read_adapter(path, model.config), model.config))
    return model, read_tokenizer(base)


def load_classifier(
    path: Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> tuple[Classifier, TextIds]:
    """Classifier in eval mode of a model folder, and how texts become what it reads; `dtype` None: as stored.

    Our own encoder stays in fp32, where it is as fast. TokenizerError where there is no tokenizer, InvalidInput where
    no labels were learned yet.
    """
    shape, tokenizer = read_classifier_shape(path), read_tokenizer(path)
    if not shape.labels:
        raise InvalidInput(
            f"{path} knows no labels yet; train it first: smelt train-classifier --model {path}", "model"
        )
    if tokenizer is None:
        raise TokenizerError(f"{path} has no tokenizer; put its tokenizer.json beside the weights")
    if isinstance(shape.backbone, NgramConfig):
        dtype = None
    return read_classifier(path, dtype, device), text_ids(shape, tokenizer)


def text_ids(shape: ClassifierShape, tokenizer: Tokenizer, max_length: int | None = None) -> TextIds:
    """How texts become what a model of this shape reads; `max_length` None: as long as it can."""
    backbone = shape.backbone
    lowercase = isinstance(backbone, NgramConfig) and backbone.lowercase
    return TextIds(tokenizer, min(max_length or shape.block_size, shape.block_size), lowercase)


def nanogpt_tokenizer(path: Path, config: DecoderConfig) -> Tokenizer | None:
    """The vocabulary of the `meta.pkl` beside a checkpoint; without one, GPT-2's where the size says so."""
    if (path.parent / META_FILE).is_file():
        return read_meta_pickle(path.parent / META_FILE)
    if config.vocab_size in GPT2_VOCAB_SIZES:
        return make_tokenizer("gpt2", lambda: iter(()))
    return None


def convert(path: Path, folder: Path) -> None:
    """Write a nanoGPT `ckpt.pt` and its vocabulary, or an adapter with the model that it changes, as a model folder."""
    model, tokenizer = load_model(path)
    write_model(model.config, model.state_dict(), folder)
    if tokenizer is not None:
        tokenizer.save(folder)
