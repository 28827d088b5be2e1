"""Tinker's protobuf messages to and from arrays; knows no HTTP, no model and no loss.

Bodies come from strangers: every length is compared with what it claims to hold before anything is allocated.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from smelt.errors import InvalidInput, TooLarge
from smelt.transport import tinker_pb2 as pb
from smelt.types import Datum

MAX_VALUES = 2**26  # of one datum's input, a sparse one filled up with its zeros
NO_TOKEN = 0
NO_LOGPROB = -99999.0  # fills the cells of alternatives that there are not

Floats = NDArray[np.float32]
# What may be sent to us. All numbers are little-endian.
DTYPES: dict[int, str] = {pb.DTYPE_FLOAT32: "<f4", pb.DTYPE_INT64: "<i8"}


@dataclass(frozen=True, slots=True, eq=False)
class ForwardBackward:
    """A request for a loss and, unless `forward_only`, its gradient. Settings of the loss are numbers or words."""

    model_id: str
    seq_id: int
    data: tuple[Datum, ...]
    loss_name: str
    loss_settings: Mapping[str, float | str]
    forward_only: bool


@dataclass(frozen=True, slots=True, eq=False)
class TopLogprobs:
    """The likeliest tokens at each of n places: ids and log-probabilities, (n, K)."""

    token_ids: NDArray[np.int32]
    logprobs: Floats


@dataclass(frozen=True, slots=True, eq=False)
class Sampled:
    """One sampled sequence; its stop token, if it has come to one, is the last."""

    tokens: Sequence[int]
    logprobs: Sequence[float]
    has_stopped: bool
    top: TopLogprobs | None = None


def decode_place(body: bytes) -> tuple[str, int, bytes]:
    """(model id, seq id) of a request, whatever else is wrong with it, and its bytes in a form that has one order."""
    message = _forward_backward(body)
    return message.model_id, message.seq_id, message.SerializeToString(deterministic=True)


def decode_forward_backward(body: bytes) -> ForwardBackward:
    """A request. InvalidInput and TooLarge name the datum and the input that are wrong."""
    message = _forward_backward(body)
    settings: dict[str, float | str] = dict(message.loss_fn_config)
    for name, value in message.loss_fn_config_v2.items():
        settings[name] = value.text if value.WhichOneof("value") == "text" else value.number
    data = tuple(_datum(datum, f"datum {number}") for number, datum in enumerate(message.data))
    return ForwardBackward(
        message.model_id, message.seq_id, data, message.loss_fn, settings, bool(message.forward_only)
    )


def encode_data(data: Sequence[Datum]) -> bytes:
    """A request that has nothing but its data; `with_loss` says what is to be done with them."""
    return pb.ForwardBackwardRequest(data=[_encoded(datum) for datum in data]).SerializeToString(deterministic=True)


def with_loss(data: bytes, model_id: str, loss_name: str, settings: Mapping[str, float], forward_only: bool) -> bytes:
    """The request for a loss on such data."""
    message = _forward_backward(data)
    message.model_id, message.loss_fn, message.forward_only = model_id, loss_name, forward_only
    message.loss_fn_config.update(settings)
    return message.SerializeToString(deterministic=True)


def decode_outputs(body: bytes) -> tuple[list[Floats], dict[str, float]]:
    """(each datum's log-probabilities, metrics) of an answer of ours."""
    message = pb.ForwardBackwardOutput()
    message.ParseFromString(body)
    logprobs: list[Floats] = []
    for record in message.loss_fn_outputs:
        field = record.fields["logprobs"]
        offsets = _numbers(field.offsets, "<i8", "an answer")
        for start, end in zip(offsets, offsets[1:], strict=False):
            logprobs.append(np.frombuffer(field.data[start:end], "<f4").reshape(-1, *field.trailing_shape))
    return logprobs, dict(message.metrics)


def encode_outputs(logprobs: Sequence[Floats], metrics: Mapping[str, float]) -> bytes:
    """The answer: each datum's log-probabilities, (N,) or (N, K), in the order of the request.

    Neighbours with the same K share a record. `metrics` are called `name:reduction`.
    """
    records = [_record(list(group)) for _, group in groupby(logprobs, key=lambda each: each.shape[1:])]
    message = pb.ForwardBackwardOutput(
        loss_fn_output_type="ArrayRecord", loss_fn_outputs=records, metrics=dict(metrics)
    )
    return message.SerializeToString(deterministic=True)


def encode_samples(
    sequences: Sequence[Sampled],
    *,
    prompt_logprobs: Floats | None = None,
    prompt_top: TopLogprobs | None = None,
    num_cached_tokens: int = 0,
    target_prompt_logprobs: Floats | None = None,
    alternatives: TopLogprobs | None = None,
) -> bytes:
    """The answer to a request for samples. Where a prompt's token has no log-probability, it is NaN."""
    message = pb.SampleResponse(
        sequences=[_sequence(each) for each in sequences], prompt_cache_hit_tokens=num_cached_tokens
    )
    if prompt_logprobs is not None:
        message.prompt_logprobs = _bytes(prompt_logprobs, "<f4")
    if prompt_top is not None:
        message.topk_prompt_logprobs.CopyFrom(_top(prompt_top))
    if target_prompt_logprobs is not None:
        message.target_prompt_logprobs.CopyFrom(_tensor(target_prompt_logprobs, "<f4", pb.DTYPE_FLOAT32))
    if alternatives is not None:
        message.prompt_alt_tokens.tokens.CopyFrom(_tensor(alternatives.token_ids, "<i4", pb.DTYPE_INT32))
        message.prompt_alt_tokens.logprobs.CopyFrom(_tensor(alternatives.logprobs, "<f4", pb.DTYPE_FLOAT32))
    return message.SerializeToString(deterministic=True)


def loss_told(request: bytes, answer: bytes) -> tuple[float, float, int] | None:
    """(loss, the weight it is over, tokens) of a request for a loss that was done; None where it had no gradient.

    The weight is the sum of the weights or, for losses of rewards, the number of tokens that have an advantage.
    """
    message, output = _forward_backward(request), pb.ForwardBackwardOutput()
    if message.forward_only:
        return None
    output.ParseFromString(answer)
    num_tokens = sum(len(chunk.encoded_text.tokens) for datum in message.data for chunk in datum.model_input) // 4
    weight = sum(_weight(datum) for datum in message.data)
    return output.metrics["loss:sum"], weight, num_tokens


def samples_told(answer: bytes) -> tuple[int, int, float]:
    """(samples, their tokens, the sum of their log-probabilities) of an answer of ours."""
    message = pb.SampleResponse()
    message.ParseFromString(answer)
    logprobs = [np.frombuffer(each.logprobs, "<f4") for each in message.sequences]
    return len(logprobs), sum(map(len, logprobs)), float(sum(each.sum(dtype=np.float64) for each in logprobs))


def padded_top(rows: Sequence[Sequence[tuple[int, float]]], k: int) -> TopLogprobs:
    """(id, log-probability) pairs of each place as arrays of K columns; a place without any is all filler."""
    token_ids = np.full((len(rows), k), NO_TOKEN, np.int32)
    logprobs = np.full((len(rows), k), NO_LOGPROB, np.float32)
    for row, pairs in enumerate(rows):
        for column, (token_id, logprob) in enumerate(pairs[:k]):
            token_ids[row, column], logprobs[row, column] = token_id, logprob
    return TopLogprobs(token_ids, logprobs)


def _forward_backward(body: bytes) -> pb.ForwardBackwardRequest:
    message = pb.ForwardBackwardRequest()
    try:
        message.ParseFromString(body)
    except DecodeError as error:
        raise InvalidInput(f"the body is no ForwardBackwardRequest: {error}") from None
    return message


def _weight(datum: pb.Datum) -> float:
    inputs = datum.loss_fn_inputs
    for name in ("weights", "advantages"):
        if name in inputs:
            tensor = inputs[name]
            dense = tensor.sparse_csr.values if tensor.WhichOneof("encoding") == "sparse_csr" else tensor.dense
            values = np.frombuffer(dense, DTYPES[tensor.dtype])
            return float(np.abs(values).sum(dtype=np.float64) if name == "weights" else np.count_nonzero(values))
    return sum(len(chunk.encoded_text.tokens) for chunk in datum.model_input) / 4


def _encoded(datum: Datum) -> pb.Datum:
    chunk = pb.Chunk(encoded_text=pb.EncodedTextChunk(tokens=_bytes(datum.tokens, "<i4")))
    inputs = {
        name: _tensor(values, "<i8", pb.DTYPE_INT64)
        if np.issubdtype(values.dtype, np.integer)
        else _tensor(values, "<f4", pb.DTYPE_FLOAT32)
        for name, values in datum.inputs.items()
    }
    return pb.Datum(model_input=[chunk], loss_fn_inputs=inputs)


def _datum(message: pb.Datum, place: str) -> Datum:
    tokens = _tokens(message, place)
    inputs: dict[str, Any] = {}
    for name, tensor in message.loss_fn_inputs.items():
        values = _array(tensor, f"{place}: {name}")
        if values.ndim not in (1, 2) or len(values) != len(tokens):
            raise InvalidInput(
                f"{place}: {name} has the shape {list(values.shape)}, and the model input has {len(tokens)} tokens; "
                f"give one value (or K) for each of them",
                name,
            )
        inputs[name] = values
    return Datum(tokens, inputs)


def _tokens(message: pb.Datum, place: str) -> NDArray[np.int32]:
    pieces = []
    for chunk in message.model_input:
        kind = chunk.WhichOneof("chunk")
        if kind != "encoded_text":
            raise InvalidInput(f"{place}: the model input has a chunk of the kind {kind}; only text is supported")
        pieces.append(_numbers(chunk.encoded_text.tokens, "<i4", f"{place}: a chunk of the model input"))
    tokens = np.concatenate(pieces) if pieces else np.empty(0, np.int32)
    if len(tokens) == 0:
        raise InvalidInput(f"{place}: the model input has no tokens")
    return tokens


def _array(tensor: pb.Tensor, place: str) -> NDArray[Any]:
    if tensor.dtype not in DTYPES:
        raise InvalidInput(f"{place} has the dtype {tensor.dtype}; float32 and int64 are supported")
    dtype, shape = DTYPES[tensor.dtype], tuple(tensor.shape)
    if any(size < 0 for size in shape):
        raise InvalidInput(f"{place} has the shape {list(shape)}")
    if math.prod(shape) > MAX_VALUES:
        raise TooLarge(f"{place} has the shape {list(shape)}, more than {MAX_VALUES:,} values", place)
    if tensor.WhichOneof("encoding") == "sparse_csr":
        return _filled(tensor.sparse_csr, dtype, shape, place)
    values = _numbers(tensor.dense, dtype, place)
    shape = shape or values.shape
    if math.prod(shape) != len(values):
        raise InvalidInput(f"{place} has {len(values)} values, and its shape {list(shape)} wants {math.prod(shape)}")
    return values.reshape(shape)


def _filled(csr: pb.SparseCsr, dtype: str, shape: tuple[int, ...], place: str) -> NDArray[Any]:
    """A sparse matrix with its zeros."""
    if len(shape) != 2:
        raise InvalidInput(f"{place} is sparse and has the shape {list(shape)}; a sparse one has rows and columns")
    values = _numbers(csr.values, dtype, place)
    starts, columns = _numbers(csr.crow_indices, "<i8", place), _numbers(csr.col_indices, "<i8", place)
    counts = np.diff(starts)
    is_sound = (
        len(starts) == shape[0] + 1
        and starts[0] == 0
        and bool((counts >= 0).all())
        and starts[-1] == len(values) == len(columns)
        and bool(((columns >= 0) & (columns < shape[1])).all())
    )
    if not is_sound:
        raise InvalidInput(f"{place} is no sparse matrix of the shape {list(shape)}: its indices do not fit")
    filled = np.zeros(shape, values.dtype)
    filled[np.repeat(np.arange(shape[0]), counts), columns] = values
    return filled


def _numbers(data: bytes, dtype: str, place: str) -> NDArray[Any]:
    size = np.dtype(dtype).itemsize
    if len(data) % size:
        raise InvalidInput(f"{place} has {len(data)} bytes, which are not whole numbers of {size}")
    return np.frombuffer(data, dtype)


def _record(group: list[Floats]) -> pb.ArrayRecord:
    """Tensors that differ in their first dimension alone, one after the other."""
    data = [_bytes(each, "<f4") for each in group]
    offsets = np.cumsum([0, *map(len, data)])
    field = pb.BatchedTensor(
        data=b"".join(data),
        offsets=_bytes(offsets, "<i8"),
        dtype=pb.DTYPE_FLOAT32,
        trailing_shape=group[0].shape[1:],
    )
    return pb.ArrayRecord(type_tag="ArrayRecord", fields={"logprobs": field}, num_datums=len(group))


def _sequence(sampled: Sampled) -> pb.SampledSequence:
    return pb.SampledSequence(
        stop_reason=pb.STOP_REASON_STOP if sampled.has_stopped else pb.STOP_REASON_LENGTH,
        tokens=_bytes(sampled.tokens, "<i4"),
        logprobs=_bytes(sampled.logprobs, "<f4"),
        topk_sampled_logprobs=None if sampled.top is None else _top(sampled.top),
    )


def _top(top: TopLogprobs) -> pb.TopkLogprobs:
    length, k = top.token_ids.shape
    return pb.TopkLogprobs(
        token_ids=_bytes(top.token_ids, "<i4"), logprobs=_bytes(top.logprobs, "<f4"), k=k, length=length
    )


def _tensor(values: NDArray[Any], dtype: str, code: "pb.DType.ValueType") -> pb.Tensor:
    return pb.Tensor(dense=_bytes(values, dtype), dtype=code, shape=values.shape)


def _bytes(values: Any, dtype: str) -> bytes:
    return np.ascontiguousarray(values, dtype).tobytes()
