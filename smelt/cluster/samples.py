"""Samples between the ledger's messages and the engine: what weights are drawn from, what is answered."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from smelt.inference.events import SampledTokens, Samples
from smelt.inference.sample_jobs import Sampling
from smelt.models.folders import is_adapter
from smelt.transport.operations import Sample
from smelt.transport.tinker_wire import NO_LOGPROB, Sampled, TopLogprobs, encode_samples, padded_top


def sampling_of(key: str, owner: str, request: Sample, home: Path) -> tuple[str, Sampling]:
    """The model to draw from, and what the inference server is to draw.

    An adapter goes by its sampler's id, which no other has had; a whole model is its folder's name.
    """
    sampler = request.sampler
    if sampler.folder is None:
        return sampler.base_model, Sampling(key, request, owner)
    if is_adapter(home / sampler.folder):
        return sampler.base_model, Sampling(key, request, owner, sampler.sampler_id, home / sampler.folder)
    return sampler.folder, Sampling(key, request, owner)


def encoded(event: Samples) -> bytes:
    """The answer, as it goes over HTTP."""
    request, wishes = event.request, event.wishes
    assert isinstance(request, Sample), "that is what was asked for"
    num_prompt, params = len(request.prompt_ids), request.params
    num_asked = num_prompt if request.last_prompt_logprobs is None else request.last_prompt_logprobs
    first = max(1, num_prompt - num_asked)
    prompt_logprobs: NDArray[np.float32] | None = None
    prompt_top: TopLogprobs | None = None
    if params.num_prompt_logprobs is not None:
        prompt_logprobs = np.array([np.nan if p is None else p for p in event.prompt_logprobs], np.float32)
        prompt_logprobs[:first] = np.nan
        if params.num_prompt_logprobs:
            prompt_top = padded_top([(), *event.prompt_top[1:]], params.num_prompt_logprobs)
            prompt_top.logprobs[:first], prompt_top.token_ids[:first] = NO_LOGPROB, 0
    targets: NDArray[np.float32] | None = None
    alternatives: TopLogprobs | None = None
    if wishes is not None and request.num_targets:
        targets = np.array(wishes.target_logprobs, np.float32).reshape(-1, request.num_targets)
    if wishes is not None and request.num_alternatives:
        alternatives = padded_top(wishes.alternatives, request.num_alternatives)
    return encode_samples(
        [_sampled(each, params.num_logprobs or 0) for each in event.samples],
        prompt_logprobs=prompt_logprobs,
        prompt_top=prompt_top,
        num_cached_tokens=event.num_cached_tokens,
        target_prompt_logprobs=targets,
        alternatives=alternatives,
    )


def _sampled(tokens: SampledTokens, num_top: int) -> Sampled:
    top = padded_top(tokens.top, num_top) if num_top else None
    return Sampled(tokens.token_ids, tokens.logprobs, tokens.has_stopped, top)
