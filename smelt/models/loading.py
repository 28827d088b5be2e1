"""A model ready to use, with its tokenizer, from whatever `registry.resolve` found; knows no names."""

from pathlib import Path

import torch

from smelt.configs import DecoderConfig
from smelt.data.characters import read_meta_pickle
from smelt.data.tokenizers import Tokenizer, make_tokenizer
from smelt.models.adapter_folders import merged, read_adapter
from smelt.models.decoder import Decoder
from smelt.models.folders import base_of, read_tokenizer
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
