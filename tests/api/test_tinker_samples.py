"""Samples asked on the wire: told apart by their seq, kept waiting in a crowd, refused where none can be drawn."""

from typing import Any

import pytest

from scripted import CONTEXT
from smelt.api.services import Services
from smelt.control import samplers
from smelt.transport import tinker_pb2 as pb
from tinker_speaker import SAMPLE, Client, client, sampling, services, working

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(60)]

__all__ = ["client", "services"]


async def test_samples_are_told_apart_by_their_seq_however_large(client: Client, services: Services) -> None:
    model_id = await client.model()
    sampler = (await client.post("create_sampling_session", sampling(model_id))).json()["sampling_session_id"]
    seqs = (0, 1, 10**18 - 1)
    promises = []
    for seq in seqs:
        body = {"sampling_session_id": sampler, "seq_id": seq, "num_samples": 3, **SAMPLE}
        first, again = [await client.post("asample", body) for _ in range(2)]
        assert first.json() == again.json()
        assert len(set(first.json()["sample_sequence_ids"])) == 3
        promises.append(first)
    assert len({each.json()["request_id"] for each in promises}) == 3
    async with working(services) as worker:
        for promised in promises:
            answer = await client.result(promised)
            assert answer.headers["content-type"] == "application/x-protobuf"
            assert len(pb.SampleResponse.FromString(answer.content).sequences) == 3
        assert len(worker.samples) == 3


async def test_a_crowd_of_samples_is_asked_to_wait_and_leaves_no_trace(
    client: Client, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samplers, "MAX_WAITING", 1)
    monkeypatch.setattr(samplers, "COUNT_S", 0.0)
    model_id = await client.model()
    sampler = (await client.post("create_sampling_session", sampling(model_id))).json()["sampling_session_id"]
    body = {"sampling_session_id": sampler, "num_samples": 1, **SAMPLE}
    assert (await client.post("asample", {**body, "seq_id": 0})).status_code == 200
    full = await client.post("asample", {**body, "seq_id": 1})
    assert (full.status_code, full.headers["retry-after"]) == (429, "1")
    async with working(services):
        await client.result(await client.post("optim_step", {"model_id": model_id, "seq_id": 1}))
        monkeypatch.setattr(samplers, "MAX_WAITING", 9)
        assert (await client.result(await client.post("asample", {**body, "seq_id": 1}))).status_code == 200


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"num_samples": 0}, "num_samples"),
        ({"prompt": {"chunks": []}}, "no tokens"),
        ({"prompt": {"chunks": [{"type": "image", "data": "x", "format": "png"}]}}, "only text"),
        ({"prompt": {"chunks": [{"tokens": [-1]}]}}, "tokens that the model does not"),
        ({"sampling_params": {"max_tokens": CONTEXT}}, "exceeds the model's context window: 2 + 48 > 48"),
        ({"sampling_params": {"top_p": 0}}, "top_p"),
        ({"sampling_params": {"stop": [1, "a"]}}, "stop"),
        ({"target_prompt_logprobs": {"data": [1], "shape": [5, 1]}}, "target_prompt_logprobs"),
        ({"target_prompt_logprobs": {"data": [1], "shape": [1, 10**9]}}, "target_prompt_logprobs"),
        ({"target_prompt_logprobs": {"data": [9999], "shape": [1, 1]}}, "tokens that the model does not"),
        ({"topk_sample_logprobs": 999}, "no more than 257 tokens"),
        ({"prompt_logprobs_last_n": 1}, "needs prompt_logprobs"),
        ({"prompt_logprobs": True, "prompt_logprobs_last_n": 2}, "below the prompt's 2 tokens"),
    ],
)
async def test_a_sample_that_cannot_be_drawn_is_refused_at_once(
    client: Client, change: dict[str, Any], told: str
) -> None:
    model_id = await client.model()
    sampler = (await client.post("create_sampling_session", sampling(model_id))).json()["sampling_session_id"]
    answer = await client.post("asample", {"sampling_session_id": sampler, "seq_id": 0, **SAMPLE, **change})
    assert answer.status_code == 400
    assert told in answer.json()["detail"]
