"""A model and an adapter of it as one model, which needs no adapter any more; knows no names and no sessions."""

from pathlib import Path

from smelt.data.chat_format import ChatFormat
from smelt.data.tokenizers import Tokenizer
from smelt.models.adapter_folders import Adapter, merged, read_adapter
from smelt.models.decoder import Decoder
from smelt.models.folders import base_of
from smelt.models.loading import load_model
from smelt.models.weights import write_model


def merge_folders(base: Path, adapter: Path, folder: Path) -> None:
    """Write what a model's folder and an adapter's are together. UnsupportedModel where they do not fit."""
    model, tokenizer = load_model(base)
    chat_format = ChatFormat(base_of(base), tokenizer, None) if tokenizer is not None and base.is_dir() else None
    write_merged(model, tokenizer, chat_format, read_adapter(adapter, model.config), folder)


def write_merged(
    model: Decoder, tokenizer: Tokenizer | None, chat_format: ChatFormat | None, adapter: Adapter, folder: Path
) -> None:
    """Write W + scale B A in the dtype of W, and what belongs to the model besides. OutOfSpace."""
    config, state = merged(model.state_dict(), adapter, model.config)
    write_model(config, state, folder)
    if tokenizer is not None:
        tokenizer.save(folder)
    if chat_format is not None:
        chat_format.save(folder)
