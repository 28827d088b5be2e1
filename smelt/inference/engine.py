"""Engine: steps many sequences at once through one model; knows no text, only token ids.

Each step first computes the prompts of newly admitted sequences and one more token for all that were running,
then draws for all of them together.
"""

import torch
from torch import Tensor

from smelt.errors import InvalidInput
from smelt.inference.kv_cache import SlotCache
from smelt.inference.sampler import check_params, sample
from smelt.inference.scheduler import Scheduler
from smelt.inference.sequence import Sequence, Status
from smelt.models.batch import Batch
from smelt.models.decoder import Decoder


class Engine:
    """`add` a sequence, `step` until it is finished, or `abort` it.

    `vocab_size` is how many token ids the tokenizer has where the model has more: the rest are never drawn.
    """

    def __init__(self, model: Decoder, num_slots: int = 8, vocab_size: int | None = None) -> None:
        self.model = model.eval()
        self.vocab_size = min(vocab_size or model.config.vocab_size, model.config.vocab_size)
        self.max_length = model.config.block_size
        self.device = model.embedding.weight.device
        self.scheduler = Scheduler(num_slots)
        self.cache = SlotCache(model.config, num_slots, model.embedding.weight.dtype, self.device)

    @property
    def has_work(self) -> bool:
        """Whether any sequence is waiting or running."""
        return self.scheduler.has_work

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. InvalidInput where its prompt is empty, unknown to the model or too long for it."""
        num_prompt = len(sequence.prompt_ids)
        if num_prompt == 0:
            raise InvalidInput("the prompt has no tokens; begin with the end-of-text token to start from nothing")
        if num_prompt >= self.max_length:
            raise InvalidInput(
                f"the prompt has {num_prompt} tokens, but the model's context is {self.max_length} and the answer "
                f"needs at least one of them; shorten the prompt"
            )
        if not all(0 <= token < self.model.config.vocab_size for token in sequence.prompt_ids):
            raise InvalidInput(f"the prompt has token ids outside of 0..{self.model.config.vocab_size - 1}")
        check_params(sequence.params, self.vocab_size)
        self.scheduler.add(sequence)

    def abort(self, sequence: Sequence) -> None:
        """Stop a sequence and free its slot; one that is finished stays as it is."""
        if sequence.status is not Status.FINISHED:
            self._release(sequence)
            sequence.finish("aborted")

    @torch.inference_mode()
    def step(self) -> list[tuple[Sequence, int]]:
        """Draw one token for every running sequence, newly admitted ones included; [] where there is no work."""
        num_before = len(self.scheduler.running)
        self.scheduler.admit()
        sequences = list(self.scheduler.running)
        if not sequences:
            return []
        hidden_BC = torch.cat([*self._decode(sequences[:num_before]), *self._prefill(sequences, num_before)])
        logits_BV = self.model.logits(hidden_BC).float()[:, : self.vocab_size]
        produced = list(zip(sequences, sample(logits_BV, sequences), strict=True))
        for sequence, drawn in produced:
            sequence.append(drawn.token, drawn.logprob, self.max_length)
            if sequence.status is Status.FINISHED:
                self._release(sequence)
        return [(sequence, drawn.token) for sequence, drawn in produced]

    def _decode(self, sequences: list[Sequence]) -> list[Tensor]:
        """Hidden states (B, C) after the last drawn token of each: they fill the slots 0..B-1."""
        if not sequences:
            return []
        positions = [sequence.num_tokens - 1 for sequence in sequences]
        tokens_B1 = torch.tensor([[sequence.output_ids[-1]] for sequence in sequences], device=self.device)
        positions_B1 = torch.tensor(positions, device=self.device)[:, None]
        hidden_B1C = self.model(Batch(tokens_B1, positions=positions_B1), self.cache.attend_next(positions))
        return [hidden_B1C[:, -1]]

    def _prefill(self, sequences: list[Sequence], first_slot: int) -> list[Tensor]:
        """Hidden states (1, C) after each new prompt, in order. Prompts of one length are computed together."""
        by_length: dict[int, list[int]] = {}
        for slot in range(first_slot, len(sequences)):
            by_length.setdefault(len(sequences[slot].prompt_ids), []).append(slot)
        last_hidden: dict[int, Tensor] = {}
        for num_tokens, slots in by_length.items():
            tokens_BT = torch.tensor([sequences[slot].prompt_ids for slot in slots], device=self.device)
            hidden_BTC = self.model(Batch(tokens_BT), self.cache.attend_prompts(slots, num_tokens))
            last_hidden |= {slot: hidden_BTC[row, -1:] for row, slot in enumerate(slots)}
        return [last_hidden[slot] for slot in sorted(last_hidden)]

    def _release(self, sequence: Sequence) -> None:
        moved = self.scheduler.remove(sequence)
        if moved is not None:
            self.cache.move(*moved)
