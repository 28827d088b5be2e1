"""Engine: steps many sequences at once through one model; knows no text, only token ids.

A step is one forward pass over the tokens that the scheduler chose: the newest of every sequence that is writing, and
parts of prompts. Then one more token is drawn for each sequence that has been computed up to its end.
"""

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from smelt.errors import InvalidInput
from smelt.inference.adapters import AdapterPool
from smelt.inference.block_tables import BlockTables
from smelt.inference.kv_cache import KVCache, default_num_blocks, num_blocks_in
from smelt.inference.prompt_logprobs import rate_prompt
from smelt.inference.recorded_steps import RecordedSteps
from smelt.inference.sampler import check_params, sample
from smelt.inference.scheduler import Chunk, Scheduler
from smelt.inference.sequence import Sequence, Status
from smelt.inference.step_attention import attend_chunks
from smelt.models.batch import NO_ADAPTER, Batch
from smelt.models.decoder import Decoder

BLOCK_SIZE = 16  # tokens
MAX_RUNNING = 64
MAX_STEP_TOKENS = 1024


@dataclass(frozen=True, slots=True)
class EngineStats:
    """What an engine is doing, and what it has done since it was made (`total_`)."""

    num_running: int
    num_waiting: int
    num_blocks: int
    num_blocks_used: int  # by sequences; what is only kept for later does not count
    batch_size: int  # tokens of the last step
    total_prompt_tokens: int
    total_cached_tokens: int  # of those, which needed no computing
    total_preempted: int


class Engine:
    """`add` a sequence, `step` until it is finished, or `abort` it.

    `vocab_size` is how many token ids the tokenizer has where the model has more: the rest are neither taken nor
    drawn. The cache has `num_blocks` blocks, or what `kv_bytes` hold, or else room for `max_running` contexts and at
    most a quarter of the free memory; memory is taken as it is needed. A step computes `max_step_tokens`, and a
    few more where that ends a prompt; one for each running sequence at least.
    """

    def __init__(
        self,
        model: Decoder,
        vocab_size: int | None = None,
        *,
        max_running: int = MAX_RUNNING,
        num_blocks: int | None = None,
        kv_bytes: int | None = None,
        block_size: int = BLOCK_SIZE,
        max_step_tokens: int = MAX_STEP_TOKENS,
    ) -> None:
        self.model = model.eval()
        self.vocab_size = min(vocab_size or model.config.vocab_size, model.config.vocab_size)
        weight = model.embedding.weight
        self.device = weight.device
        if kv_bytes is not None:
            num_blocks = num_blocks_in(kv_bytes, model.config, block_size, weight.dtype)
        if num_blocks is None:
            num_blocks = default_num_blocks(max_running, model.config, block_size, weight.dtype, weight.device)
        self.cache = KVCache(model.config, num_blocks, block_size, weight.dtype, weight.device)
        self.tables = BlockTables(num_blocks, block_size)
        self.scheduler = Scheduler(self.tables, max_running, max(max_step_tokens, max_running))
        self.max_length = min(model.config.block_size, num_blocks * block_size)
        self.adapters = AdapterPool(model)
        self._recorded = RecordedSteps(model, self.cache, self.adapters, -(-self.max_length // block_size))
        self._batch_size = 0

    @property
    def has_work(self) -> bool:
        """Whether any sequence is waiting or running."""
        return self.scheduler.has_work

    @property
    def stats(self) -> EngineStats:
        """Figures of this moment."""
        return EngineStats(
            num_running=len(self.scheduler.running),
            num_waiting=self.scheduler.num_waiting,
            num_blocks=self.tables.num_blocks,
            num_blocks_used=self.tables.num_used,
            batch_size=self._batch_size,
            total_prompt_tokens=self.scheduler.total_prompt_tokens,
            total_cached_tokens=self.scheduler.total_cached_tokens,
            total_preempted=self.scheduler.total_preempted,
        )

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence; one that was removed goes on where it stood.

        InvalidInput where its prompt is empty, unknown to the model or too long, or its settings cannot be;
        UnknownAdapter where its adapter is not among `adapters`.
        """
        if not sequence.prompt_ids:
            raise InvalidInput("the prompt has no tokens; begin with the end-of-text token to start from nothing")
        if sequence.num_tokens >= self.max_length:
            raise InvalidInput(self._why_too_long(sequence.num_tokens))
        if min(sequence.prompt_ids) < 0 or max(sequence.prompt_ids) >= self.vocab_size:
            raise InvalidInput(f"the prompt has token ids outside of 0..{self.vocab_size - 1}")
        check_params(sequence.params, self.vocab_size)
        if sequence.adapter is not None:
            sequence.adapter_version = self.adapters.version(sequence.adapter)
        sequence.block_keys.clear()
        self.scheduler.add(sequence)

    def abort(self, sequence: Sequence) -> None:
        """Stop a sequence and free its blocks; one that is finished stays as it is."""
        if sequence.status is not Status.FINISHED:
            self.scheduler.remove(sequence)
            sequence.finish("aborted")

    def remove(self, sequence: Sequence) -> None:
        """Take out a sequence that is not finished, to `add` it again later."""
        self.scheduler.remove(sequence)
        sequence.status = Status.WAITING

    def reset(self) -> None:
        """Forget what the cache holds, after a step that failed half-way. All sequences wait, and go on as before."""
        self.scheduler.preempt_all()
        self.tables.forget()

    @torch.inference_mode()
    def step(self) -> list[tuple[Sequence, int]]:
        """Compute the next tokens and prompts; the sequences that have a new token, with it. [] without work."""
        plan = self.scheduler.plan()
        if not plan.chunks:
            return []
        self.cache.copy(plan.copies)
        self._batch_size = sum(chunk.num_tokens for chunk in plan.chunks)
        if all(chunk.num_tokens == 1 and chunk.is_last for chunk in plan.chunks) and (
            outcome := self._recorded.run(plan.chunks, self._slots(plan.chunks))
        ):
            hidden_NC, logits_NV = outcome
            self._note_computed(plan.chunks, hidden_NC)
            return self._draw([chunk.sequence for chunk in plan.chunks], logits_NV)
        attend = attend_chunks(self.cache, plan.chunks, self.model.config.sliding_window)
        hidden_NC = self.model(self._batch(plan.chunks), attend)[0]
        self._note_computed(plan.chunks, hidden_NC)
        ends = np.cumsum([chunk.num_tokens for chunk in plan.chunks])
        rows = [int(end) - 1 for chunk, end in zip(plan.chunks, ends, strict=True) if chunk.is_last]
        own = [chunk for chunk in plan.chunks if chunk.is_last]
        if not own:
            return []
        return self._draw([chunk.sequence for chunk in own], self.adapters.logits(hidden_NC[rows], self._slots(own)))

    def _batch(self, chunks: list[Chunk]) -> Batch:
        """One row with the tokens of all chunks."""
        tokens = [token for chunk in chunks for token in chunk.sequence.tokens(chunk.start, chunk.end)]
        positions = np.concatenate([np.arange(chunk.start, chunk.end) for chunk in chunks])
        return Batch(
            torch.tensor([tokens], device=self.device),
            positions=torch.from_numpy(positions)[None].to(self.device),
            adapter_ids=self._adapter_ids(chunks),
        )

    def _adapter_ids(self, chunks: list[Chunk]) -> Tensor | None:
        if all(chunk.sequence.adapter is None for chunk in chunks):
            return None
        return torch.from_numpy(self._slots(chunks).repeat([chunk.num_tokens for chunk in chunks]))[None]

    def _slots(self, chunks: list[Chunk]) -> NDArray[np.int64]:
        """The slot of each chunk's adapter."""
        slots = [
            NO_ADAPTER
            if (name := chunk.sequence.adapter) is None
            else self.adapters.slot(name, chunk.sequence.adapter_version)
            for chunk in chunks
        ]
        return np.array(slots, np.int64)

    def _note_computed(self, chunks: list[Chunk], hidden_NC: Tensor) -> None:
        begin = 0
        for chunk in chunks:
            sequence = chunk.sequence
            rate_prompt(partial(self._prompt_logits, chunk), chunk, hidden_NC[begin : begin + chunk.num_tokens])
            self.tables.mark_computed(sequence, chunk.end)
            begin += chunk.num_tokens

    def _prompt_logits(self, chunk: Chunk, hidden_TC: Tensor) -> Tensor:
        """(T, V) in fp32 of a chunk's hidden states."""
        slots = self._slots([chunk]).repeat(len(hidden_TC))
        return self.adapters.logits(hidden_TC, slots).float()[:, : self.vocab_size]

    def _draw(self, sequences: list[Sequence], logits_BV: Tensor) -> list[tuple[Sequence, int]]:
        """The next token of each sequence, whose newest one was computed."""
        logits_BV = logits_BV.float()[:, : self.vocab_size]
        drawn = sample(logits_BV, sequences)
        for sequence, (token, logprob, top) in zip(sequences, drawn, strict=True):
            sequence.append(token, logprob, top, self.max_length)
            if sequence.status is Status.FINISHED:
                self.scheduler.remove(sequence)
        return [(sequence, token) for sequence, (token, _, _) in zip(sequences, drawn, strict=True)]

    def _why_too_long(self, num_tokens: int) -> str:
        context = self.model.config.block_size
        if num_tokens >= context:
            return (
                f"the prompt has {num_tokens} tokens, but the model's context is {context} and the answer "
                f"needs at least one of them; shorten the prompt"
            )
        return (
            f"the prompt has {num_tokens} tokens, but the cache holds {self.tables.num_blocks} blocks of "
            f"{self.tables.block_size} tokens, and the answer needs one of these; shorten the prompt or enlarge the "
            f"cache"
        )
