"""How well a model predicts texts or answers: loss, perplexity, bits per byte; knows no run and no terminal."""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from smelt.configs import DecoderConfig
from smelt.data.chat_format import ChatFormat
from smelt.data.sources import Progress
from smelt.data.tokenizers import Tokenizer
from smelt.data.training_examples import Located, Sample, samples_of, wrong_kind
from smelt.errors import DataError, InvalidInput, NotEnoughData
from smelt.models.decoder import Decoder
from smelt.training.example_batches import ExampleBatch, example_batch
from smelt.training.example_losses import supervised
from smelt.training.job import evaluate_batches
from smelt.training.parallel import Ranks


@dataclass(frozen=True, slots=True)
class Score:
    """What came of it, over the tokens that count: all of a text but its first, or what the assistant said."""

    loss: float  # mean of -log p over the tokens, in nats
    perplexity: float  # e to the loss
    bits_per_byte: float  # comparable between tokenizers: the loss of all tokens over the bytes they stand for
    accuracy: float  # share of tokens that were the likeliest
    num_examples: int
    num_tokens: int
    num_bytes: int
    seconds: float
    tokens_per_second: float  # of all that went through the model


def score(
    model: Decoder, tokenizer: Tokenizer, samples: Sequence[Sample], batch_size: int, progress: Progress
) -> Score:
    """Score a model on samples of one sequence each. `progress` hears of the bytes. NotEnoughData where there are none.

    Tokens without text, such as the end of a document, count in the loss and stand for no bytes.
    """
    if not samples:
        raise NotEnoughData("there is nothing to evaluate on: the data holds no examples")
    sizes = [num_bytes(tokenizer, sample) for sample in samples]
    device = model.embedding.weight.device
    order = sorted(range(len(samples)), key=lambda number: samples[number].num_tokens)

    def batches() -> Iterator[ExampleBatch]:
        num_done = 0
        for first in range(0, len(order), batch_size):
            part = order[first : first + batch_size]
            yield example_batch([samples[number] for number in part], device)
            num_done += sum(sizes[number] for number in part)
            progress("evaluating", num_done, sum(sizes))

    started = time.perf_counter()
    with torch.inference_mode():
        found = evaluate_batches(model, supervised, lambda _rank: batches(), Ranks(), device, ("accuracy",))
    seconds = time.perf_counter() - started
    return Score(
        loss=found.loss,
        perplexity=math.exp(min(found.loss, 700.0)),
        bits_per_byte=found.loss * found.num_targets / math.log(2) / max(1, sum(sizes)),
        accuracy=found.figures["accuracy"],
        num_examples=len(samples),
        num_tokens=found.num_targets,
        num_bytes=sum(sizes),
        seconds=seconds,
        tokens_per_second=sum(sample.num_tokens for sample in samples) / seconds,
    )


def samples_to_score(
    examples: Sequence[Located],
    shape: DecoderConfig,
    tokenizer: Tokenizer,
    chat_format: ChatFormat,
    max_length: int | None = None,
) -> list[Sample]:
    """Examples in a model's tokens, cut to `max_length` (its context). InvalidInput, DataError."""
    if max_length is not None and max_length > shape.block_size:
        raise InvalidInput(f"max-length {max_length} is more than the model's context of {shape.block_size} tokens")
    for each in examples:
        if (fault := wrong_kind(each.example, "supervised")) is not None:
            raise DataError(f"{each.where} {fault}")
    return samples_of(examples, chat_format, tokenizer, max_length or shape.block_size, shape.vocab_size)


def num_bytes(tokenizer: Tokenizer, sample: Sample) -> int:
    """Of the text that a sample's counted tokens stand for."""
    return sum(
        len(tokenizer.decode_bytes(datum.inputs["target_tokens"][np.flatnonzero(datum.inputs["weights"])].tolist()))
        for datum in sample.data
    )
