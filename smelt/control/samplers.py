"""Samplers: weights to draw from, and what is drawn, accepted into the ledger; computes nothing.

A sampler is a lane without an order: its requests are the same when their seq is. What is not accepted leaves no
trace, so that the same seq may come again. A seed that nobody gave is drawn with the acceptance and kept, so that a
second attempt draws the same.
"""

import asyncio
import hashlib
import secrets
import time
from dataclasses import dataclass, replace
from functools import partial

import msgspec
from sqlalchemy import Connection, Engine

from smelt.configs import DecoderConfig
from smelt.control.catalogue import Catalogue, Served
from smelt.control.saved_weights import WeightsStore
from smelt.control.sessions import Sessions, ask
from smelt.errors import InvalidInput, NotFound, Overloaded, SeqReused, UnknownModel
from smelt.storage import records, session_rows
from smelt.storage.futures import Ledger
from smelt.storage.records import SamplerRecord
from smelt.storage.transitions import Submission
from smelt.storage.writer import Writer
from smelt.transport.operations import SAMPLE, Sample, Sampler

MAX_WAITING = 8192  # samples that nobody has begun
COUNT_S = 0.25  # how old the count of them may be
MAX_KNOWN = 4096
MAX_SAMPLES = 1024


@dataclass(slots=True)
class Known:
    """A sampler that was asked for, and when it was last, by a monotonic clock."""

    record: SamplerRecord
    used: float


class Samplers:
    """The samplers of every owner."""

    def __init__(
        self,
        ledger: Ledger,
        database: Engine,
        writer: Writer,
        catalogue: Catalogue,
        sessions: Sessions,
        weights: WeightsStore,
    ) -> None:
        self._ledger = ledger
        self._database = database
        self._writer = writer
        self._catalogue = catalogue
        self._sessions = sessions
        self._weights = weights
        self._started = time.monotonic()
        self._known: dict[str, Known] = {}
        self._num_waiting = 0
        self._counted_at = float("-inf")

    async def create(
        self, owner: str, session_id: str, number: int, base_model: str | None = None, path: str | None = None
    ) -> str:
        """The id of the sampler that is number so-and-so of a session, with its row on the disk.

        NotFound, UnknownModel and InvalidInput; SeqReused where that number is another sampler.
        """
        await self._sessions.read(owner, session_id)
        sampler = await self._resolve(owner, session_id, number, base_model, path)

        def write(connection: Connection) -> bool:
            found = records.find(connection, SamplerRecord, owner, id=sampler.id)
            if not found:
                records.add(connection, sampler)
            return not found or replace(found[0], created=sampler.created) == sampler

        if not await asyncio.wrap_future(self._writer.write(write)):
            raise SeqReused(f"{sampler.id} is another sampler already; use the next sampling_session_seq_id")
        return sampler.id

    async def find(self, owner: str, sampler_id: str) -> SamplerRecord:
        """The owner's sampler. NotFound."""
        known = self._known.get(sampler_id)
        if known is None or known.record.owner != owner:
            found = await asyncio.to_thread(
                ask, self._database, partial(records.find, kind=SamplerRecord, owner=owner, id=sampler_id)
            )
            if not found:
                raise NotFound(f"there is no sampler {sampler_id[:200]!r}")
            known = self._remember(found[0])
        known.used = time.monotonic()
        return known.record

    async def served(self, sampler: SamplerRecord) -> Served | None:
        """The base model as it is served; None where it is not any more."""
        try:
            return await self._catalogue.find(sampler.served_model)
        except UnknownModel:
            return None

    async def sample(
        self, sampler: SamplerRecord, seq: int | None, request: Sample, meant: bytes, *, to_the_end: bool = False
    ) -> str:
        """The id of the promise, once the request is on the disk. InvalidInput, SeqReused, Overloaded.

        `to_the_end`: as many tokens as the model's context has room for, whatever the request says.
        """
        await self._check_room()
        served = await self.served(sampler)
        params = request.params
        if to_the_end:
            params = replace(params, max_tokens=_room(request, served))
        if params.seed is None:
            params = replace(params, seed=secrets.randbits(62))
        request = msgspec.structs.replace(request, params=params)
        _check(request, served)
        lane = None if seq is None else sampler.id
        submission = Submission(
            sampler.owner, SAMPLE, hashlib.sha256(meant).hexdigest(), msgspec.msgpack.encode(request), lane, seq, None
        )
        return await self._ledger.accept(submission)

    def idle_s(self, sampler_id: str) -> float:
        """How long nobody has asked for a sampler, as far as this process knows."""
        known = self._known.get(sampler_id)
        return time.monotonic() - (self._started if known is None else known.used)

    def forget(self, sampler_id: str) -> None:
        """Its row is gone."""
        self._known.pop(sampler_id, None)

    async def _resolve(
        self, owner: str, session_id: str, number: int, base_model: str | None, path: str | None
    ) -> SamplerRecord:
        sampler_id = f"{session_id}:sample:{number}"
        served = None if base_model is None else await self._catalogue.find(base_model)
        if path is None:
            if base_model is None or served is None:
                raise InvalidInput("a sampler needs a base_model or a model_path", "base_model")
            return SamplerRecord(
                owner=owner, id=sampler_id, session_id=session_id, base_model=base_model, served_model=served.name
            )
        found = await self._weights.find_saved(owner, path)
        model = found.model
        if served is not None and served.name != model.served_model:
            raise InvalidInput(f"{path} was trained on {model.base_model}, not on {base_model}", "base_model")
        return SamplerRecord(
            owner=owner, id=sampler_id, session_id=session_id, base_model=base_model or model.base_model,
            served_model=model.served_model, path=path, folder=found.weights.folder,
        )  # fmt: skip

    async def _check_room(self) -> None:
        now = time.monotonic()
        if now - self._counted_at > COUNT_S:
            self._counted_at = now
            self._num_waiting = await asyncio.to_thread(
                ask, self._database, partial(session_rows.num_waiting, kind=SAMPLE)
            )
        if self._num_waiting >= MAX_WAITING:
            raise Overloaded(f"{self._num_waiting} samples wait already; try again", retry_after_s=1)

    def _remember(self, record: SamplerRecord) -> Known:
        if len(self._known) >= MAX_KNOWN:
            for sampler_id in sorted(self._known, key=lambda each: self._known[each].used)[: MAX_KNOWN // 2]:
                del self._known[sampler_id]
        known = self._known[record.id] = Known(record, time.monotonic())
        return known


def weights_of(sampler: SamplerRecord) -> Sampler:
    """What a worker has to know of a sampler."""
    return Sampler(sampler.id, sampler.served_model, sampler.folder, sampler.lane, sampler.seq)


def _room(request: Sample, served: Served | None) -> int:
    """How many tokens fit behind the prompt; InvalidInput where that is not known. 1 where none do, which is told."""
    if served is None or served.context is None:
        raise InvalidInput("max_tokens is missing, and the model's context is not known", "max_tokens")
    return max(1, served.context - len(request.prompt_ids))


def _check(request: Sample, served: Served | None) -> None:
    """InvalidInput for what no model could draw."""
    if not 1 <= request.num_samples <= MAX_SAMPLES:
        raise InvalidInput(f"num_samples must be from 1 to {MAX_SAMPLES}, not {request.num_samples}", "num_samples")
    num_prompt = len(request.prompt_ids)
    if num_prompt == 0:
        raise InvalidInput("the prompt has no tokens", "prompt")
    if (request.last_prompt_logprobs or 0) >= num_prompt:
        raise InvalidInput(
            f"prompt_logprobs_last_n must be below the prompt's {num_prompt} tokens: nothing comes before the first",
            "prompt_logprobs_last_n",
        )
    if served is not None and served.config is not None:
        _check_shape(request, served.config)


def _check_shape(request: Sample, config: DecoderConfig) -> None:
    """InvalidInput for what a model of that shape could not draw."""
    highest, params = config.vocab_size - 1, request.params
    for what, tokens, lowest in (("prompt", request.prompt_ids, 0), ("target_prompt_logprobs", request.target_ids, -1)):
        if tokens and (min(tokens) < lowest or max(tokens) > highest):
            raise InvalidInput(f"{what} has tokens that the model does not; it has 0 to {highest}", what)
    if max(params.num_logprobs or 0, params.num_prompt_logprobs or 0) > config.vocab_size:
        raise InvalidInput(f"there are no more than {config.vocab_size} tokens to tell log-probabilities of")
    num_prompt, num_more = len(request.prompt_ids), params.max_tokens
    if num_prompt + num_more > config.block_size:
        raise InvalidInput(
            f"Prompt length plus max_tokens exceeds the model's context window: {num_prompt} + {num_more} > "
            f"{config.block_size}",
            "max_tokens",
        )
