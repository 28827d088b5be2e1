"""BlockTables: which blocks hold a sequence's tokens, and which it shares; knows no tensors and no order of work.

A full block is named by a hash of its tokens and of the block before it, down to a root of owner and adapter: equal
names mean equal contexts, and nothing is shared across owners. The partly filled last block of a prompt has a name
too; it is copied rather than shared, because its user will write into it.
"""

from array import array
from dataclasses import dataclass
from hashlib import blake2b

from smelt.inference.block_pool import BlockPool
from smelt.inference.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Prefix:
    """What a sequence finds in the cache: full blocks to share, and one to copy that holds all the rest but a token.

    `is_coming`: a running sequence computes the next part right now, so that waiting for it spares the work. For what
    one of a batch computes no live one waits.
    """

    shared: tuple[int, ...] = ()
    copied: int | None = None
    num_tokens: int = 0
    is_coming: bool = False


class BlockTables:
    """Gives blocks of `block_size` tokens to sequences: their `block_ids`, in the order of their tokens."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self._pool = BlockPool(num_blocks)
        self._coming: dict[bytes, Sequence] = {}  # names of what is being computed, and by whom

    @property
    def num_blocks(self) -> int:
        """Blocks there are."""
        return self._pool.num_blocks

    @property
    def num_used(self) -> int:
        """Blocks that sequences hold; content that nobody uses does not count."""
        return self._pool.num_blocks - self._pool.num_idle

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that so many tokens take."""
        return -(-num_tokens // self.block_size)

    def find_prefix(self, sequence: Sequence) -> Prefix:
        """The longest beginning of a sequence that it need not compute. Its last token it always has to."""
        num_full = sequence.num_skippable // self.block_size
        shared: list[int] = []
        for key in self._keys(sequence, num_full):
            block = self._pool.find(key)
            if block is None:
                return Prefix(tuple(shared), None, len(shared) * self.block_size, self._is_coming(key, sequence))
            shared.append(block)
        prefix = Prefix(tuple(shared), None, num_full * self.block_size)
        if not prefix.num_tokens < sequence.num_skippable == sequence.num_tokens - 1:
            return prefix  # a copy would spare nothing, or too much
        key = self._tail_key(sequence, num_full, sequence.num_tokens)
        copied = self._pool.find(key)
        if copied is not None:
            return Prefix(prefix.shared, copied, sequence.num_tokens - 1)
        return Prefix(prefix.shared, None, prefix.num_tokens, self._is_coming(key, sequence))

    def has_room(self, sequence: Sequence, prefix: Prefix, num_spare: int) -> bool:
        """Whether all of its tokens would have a block, and `num_spare` blocks be left."""
        num_new = self.num_blocks_for(sequence.num_tokens) - len(prefix.shared)
        num_idle = self._pool.num_idle - sum(self._pool.is_idle(block) for block in prefix.shared)
        return num_idle >= num_new + num_spare

    def give(self, sequence: Sequence, prefix: Prefix) -> list[tuple[int, int]]:
        """Give it blocks for all of its tokens, where there is room. Returns what to copy: (from, to) blocks."""
        for block in prefix.shared:
            self._pool.share(block)
        sequence.block_ids = list(prefix.shared)
        sequence.num_computed = prefix.num_tokens
        for _ in range(self.num_blocks_for(sequence.num_tokens) - len(prefix.shared)):
            has_grown = self._append_block(sequence)
            assert has_grown, "who has no room is given nothing"
        if sequence.num_computed < len(sequence.prompt_ids):
            for key in self._prompt_keys(sequence):
                if self._pool.find(key) is None and not self._is_coming(key, sequence):
                    self._coming[key] = sequence
        if prefix.copied is None:
            return []
        self._pool.touch(prefix.copied)
        return [(prefix.copied, sequence.block_ids[len(prefix.shared)])]

    def grow(self, sequence: Sequence) -> bool:
        """See that its newest token has a block. False where all are in use."""
        if len(sequence.block_ids) * self.block_size >= sequence.num_tokens:
            return True
        return self._append_block(sequence)

    def mark_computed(self, sequence: Sequence, num_tokens: int) -> None:
        """So many tokens of it are in the cache now: whoever begins with the same may share them."""
        num_full_before, num_full = sequence.num_computed // self.block_size, num_tokens // self.block_size
        if num_full > num_full_before:
            keys = self._keys(sequence, num_full)
            for index in range(num_full_before, num_full):
                self._name(sequence.block_ids[index], keys[index])
        if sequence.num_computed < len(sequence.prompt_ids) <= num_tokens:
            last = (len(sequence.prompt_ids) - 1) // self.block_size
            self._name(sequence.block_ids[last], self._prompt_keys(sequence)[-1])
            self._announce_no_more(sequence)
        sequence.num_computed = num_tokens

    def release(self, sequence: Sequence) -> None:
        """Take its blocks back. What they hold can still be found until they are needed, the end of it first gone."""
        if sequence.num_computed < len(sequence.prompt_ids):
            self._announce_no_more(sequence)
        for block in reversed(sequence.block_ids):
            self._pool.release(block)
        sequence.block_ids = []
        sequence.num_computed = 0

    def forget(self) -> None:
        """Let nothing be found any more; no sequence may hold a block."""
        assert self.num_used == 0, "a block in use cannot be forgotten"
        self._pool = BlockPool(self.num_blocks)

    def _is_coming(self, key: bytes, sequence: Sequence) -> bool:
        maker = self._coming.get(key)
        return maker is not None and (maker.is_live or not sequence.is_live)

    def _append_block(self, sequence: Sequence) -> bool:
        block = self._pool.take()
        if block is None:
            return False
        sequence.block_ids.append(block)
        return True

    def _name(self, block: int, key: bytes) -> None:
        self._pool.name(block, key)
        self._coming.pop(key, None)

    def _announce_no_more(self, sequence: Sequence) -> None:
        for key in self._prompt_keys(sequence):
            if self._coming.get(key) is sequence:
                del self._coming[key]

    def _keys(self, sequence: Sequence, num_full: int) -> list[bytes]:
        """Names of its first full blocks, which the sequence keeps once they are made."""
        keys = sequence.block_keys
        for index in range(len(keys), num_full):
            keys.append(self._tail_key(sequence, index, (index + 1) * self.block_size))
        return keys[:num_full]

    def _tail_key(self, sequence: Sequence, num_full: int, end: int) -> bytes:
        """The name of what follows so many full blocks, up to the token `end`."""
        before = sequence.block_keys[num_full - 1] if num_full else _root_key(sequence)
        tokens = array("q", sequence.tokens(num_full * self.block_size, end))
        return blake2b(before + tokens.tobytes(), digest_size=32).digest()

    def _prompt_keys(self, sequence: Sequence) -> list[bytes]:
        num_tokens = len(sequence.prompt_ids)
        num_full = num_tokens // self.block_size
        keys = self._keys(sequence, num_full)
        return keys if num_tokens % self.block_size == 0 else [*keys, self._tail_key(sequence, num_full, num_tokens)]


def _root_key(sequence: Sequence) -> bytes:
    return blake2b(repr((sequence.owner, sequence.adapter, sequence.adapter_version)).encode(), digest_size=32).digest()
