"""The real client writes what we read, and reads what we write."""

from typing import Any

import numpy as np
import pytest
import tinker
import torch
from tinker.proto import tinker_public_pb2 as public
from tinker.proto.request_conv import forward_backward_request_to_proto
from tinker.proto.response_conv import deserialize_proto_response

from smelt.errors import InvalidInput, TooLarge
from smelt.transport.tinker_wire import (
    Sampled,
    decode_forward_backward,
    decode_outputs,
    encode_data,
    encode_outputs,
    encode_samples,
    padded_top,
    with_loss,
)
from smelt.types import Datum

TARGETS, WEIGHTS = np.array([5, 6, 7]), np.array([0.0, 1.0, -4.5], np.float32)


def body_of(data: list[tinker.Datum], **fields: Any) -> bytes:
    given = tinker.types.ForwardBackwardInput(**{"data": data, "loss_fn": "cross_entropy", **fields})
    request = tinker.types.ForwardBackwardRequest(forward_backward_input=given, model_id="s:train:0", seq_id=3)
    return bytes(forward_backward_request_to_proto(request).SerializeToString())


def datum(tokens: list[int], **inputs: Any) -> tinker.Datum:
    return tinker.Datum(model_input=tinker.ModelInput.from_ints(tokens), loss_fn_inputs=inputs)


def message() -> public.ForwardBackwardRequest:
    """A request that is right, with one tensor to spoil."""
    request = public.ForwardBackwardRequest(model_id="m", seq_id=1, loss_fn="cross_entropy")
    target = request.data.add()
    target.model_input.add().encoded_text.tokens = np.array([1, 2, 3], np.int32).tobytes()
    tensor = target.loss_fn_inputs["target_tokens"]
    tensor.dtype = public.DTYPE_INT64
    tensor.shape.extend([3])
    tensor.dense = np.array([4, 5, 6], np.int64).tobytes()
    return request


def test_a_request_of_the_client_arrives() -> None:
    config = {"clip_low_threshold": 0.8, "loss_id": "l1"}
    request = decode_forward_backward(
        body_of([datum([1, 2, 3], target_tokens=TARGETS, weights=WEIGHTS)], loss_fn="ppo", loss_fn_config=config)
    )
    assert (request.model_id, request.seq_id, request.loss_name) == ("s:train:0", 3, "ppo")
    assert dict(request.loss_settings) == config
    assert request.forward_only is False
    (only,) = request.data
    assert only.tokens.tolist() == [1, 2, 3]
    assert only.inputs["target_tokens"].tolist() == [5, 6, 7]
    assert only.inputs["weights"].tolist() == [0.0, 1.0, -4.5]
    assert only.inputs["weights"].dtype == np.float32


def test_pieces_of_the_model_input_are_one() -> None:
    pieces = [tinker.EncodedTextChunk(tokens=[1]), tinker.EncodedTextChunk(tokens=[2, 3])]
    given = tinker.Datum(model_input=tinker.ModelInput(chunks=pieces), loss_fn_inputs={"target_tokens": TARGETS})
    assert decode_forward_backward(body_of([given])).data[0].tokens.tolist() == [1, 2, 3]


def test_a_sparse_input_is_filled_with_zeros() -> None:
    dense = torch.zeros(3, 50)
    dense[0, 7], dense[2, 1] = 0.25, -1.0
    given = datum([1, 2, 3], target_tokens=torch.zeros(3, 50, dtype=torch.int64), weights=dense)
    body = body_of([given])
    sent = public.ForwardBackwardRequest.FromString(body).data[0].loss_fn_inputs["weights"]
    assert sent.WhichOneof("encoding") == "sparse_csr", "the client has found it smaller"
    assert np.array_equal(decode_forward_backward(body).data[0].inputs["weights"], dense.numpy())


def test_a_tensor_without_a_shape_has_one_dimension() -> None:
    request = message()
    del request.data[0].loss_fn_inputs["target_tokens"].shape[:]
    decoded = decode_forward_backward(request.SerializeToString())
    assert decoded.data[0].inputs["target_tokens"].tolist() == [4, 5, 6]


def spoiled_shape(request: public.ForwardBackwardRequest, shape: list[int]) -> None:
    tensor = request.data[0].loss_fn_inputs["target_tokens"]
    del tensor.shape[:]
    tensor.shape.extend(shape)


def make_sparse(request: public.ForwardBackwardRequest, starts: list[int], columns: list[int]) -> None:
    spoiled_shape(request, [3, 2])
    csr = request.data[0].loss_fn_inputs["target_tokens"].sparse_csr
    csr.values = np.array([1, 1], np.int64).tobytes()
    csr.crow_indices, csr.col_indices = (np.array(each, np.int64).tobytes() for each in (starts, columns))


SPOILERS: dict[str, Any] = {
    "wants 4": lambda request: spoiled_shape(request, [4]),
    "one value (or K) for each": lambda request: spoiled_shape(request, [1, 3]),
    "shape [-3]": lambda request: spoiled_shape(request, [-3]),
    "whole numbers of 8": lambda request: setattr(request.data[0].loss_fn_inputs["target_tokens"], "dense", b"123"),
    "dtype 4": lambda request: setattr(request.data[0].loss_fn_inputs["target_tokens"], "dtype", 4),
    "kind image": lambda request: setattr(request.data[0].model_input[0].image, "data", b"pixels"),
    "no tokens": lambda request: setattr(request.data[0].model_input[0].encoded_text, "tokens", b""),
    "indices do not fit": lambda request: make_sparse(request, [0, 1, 2, 2], [0, 2]),
    "its indices do not": lambda request: make_sparse(request, [0, 2, 1, 2], [0, 1]),
    "do not fit": lambda request: make_sparse(request, [0, 1, 2], [0, 1]),
}


@pytest.mark.parametrize("words", SPOILERS)
def test_what_is_wrong_is_said_with_its_place(words: str) -> None:
    request = message()
    SPOILERS[words](request)
    with pytest.raises(InvalidInput) as caught:
        decode_forward_backward(request.SerializeToString())
    assert words in str(caught.value)
    assert "datum 0" in str(caught.value)


def test_a_sparse_giant_is_refused_before_it_is_filled() -> None:
    request = message()
    make_sparse(request, [0, 1, 2, 2], [0, 1])
    spoiled_shape(request, [3, 2**40])
    with pytest.raises(TooLarge, match="more than 67,108,864 values"):
        decode_forward_backward(request.SerializeToString())


def test_other_bytes_are_no_request() -> None:
    with pytest.raises(InvalidInput, match="no ForwardBackwardRequest"):
        decode_forward_backward(b"\xff\xff\xff\xff")


def test_the_client_reads_our_outputs() -> None:
    outputs = [np.array([-0.5, -1.0], np.float32), np.array([-2.0], np.float32), np.full((2, 3), -0.25, np.float32)]
    answer: Any = deserialize_proto_response(
        encode_outputs(outputs, {"loss:sum": 3.5}), tinker.types.ForwardBackwardOutput
    )
    assert answer.metrics == {"loss:sum": 3.5}
    read = [each["logprobs"] for each in answer.loss_fn_outputs]
    assert [each.tolist() for each in read] == [[-0.5, -1.0], [-2.0], [[-0.25] * 3] * 2]
    assert read[2].shape == [2, 3]


def test_the_client_reads_our_samples() -> None:
    top = padded_top([[(7, -0.1), (8, -2.0)], [(9, -0.3)]], 2)
    body = encode_samples(
        [Sampled([1, 2], [-0.5, -1.5], has_stopped=True, top=top), Sampled([3], [-0.25], has_stopped=False)],
        prompt_logprobs=np.array([np.nan, -1.0], np.float32),
        prompt_top=padded_top([[], [(4, -0.75)]], 1),
        num_cached_tokens=16,
    )
    answer: Any = deserialize_proto_response(body, tinker.types.SampleResponse)
    first, second = answer.sequences
    assert (first.stop_reason, first.tokens, first.logprobs) == ("stop", [1, 2], [-0.5, -1.5])
    assert (second.stop_reason, second.tokens, second.logprobs) == ("length", [3], [-0.25])
    assert answer.prompt_logprobs == [None, -1.0]
    assert answer.topk_prompt_logprobs == [None, [(4, -0.75)]]
    assert answer.prompt_cache_hit_tokens == 16


def test_data_of_our_own_become_a_request() -> None:
    tokens = np.array([1, 2, 3], np.int32)
    data = encode_data([Datum(tokens, {"target_tokens": TARGETS, "weights": WEIGHTS})])
    request = decode_forward_backward(with_loss(data, "s:train:0", "dpo", {"beta": 0.2}, forward_only=True))
    assert (request.model_id, request.loss_name, request.forward_only) == ("s:train:0", "dpo", True)
    assert dict(request.loss_settings) == {"beta": 0.2}
    (only,) = request.data
    assert (only.tokens.tolist(), only.inputs["target_tokens"].tolist()) == ([1, 2, 3], [5, 6, 7])
    assert only.inputs["weights"].dtype == np.float32


def test_an_answer_of_ours_is_read_again() -> None:
    parts = [np.float32([1, 2]), np.float32([3]), np.ones((2, 3), np.float32), np.zeros((0,), np.float32)]
    logprobs, metrics = decode_outputs(encode_outputs(parts, {"loss:sum": 2.5}))
    assert [each.tolist() for each in logprobs] == [each.tolist() for each in parts]
    assert metrics == {"loss:sum": 2.5}
