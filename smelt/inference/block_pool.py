"""BlockPool: which blocks of a cache are in use, and what the others still hold; knows no tensors and no sequences.

A block that nobody uses keeps its content until it is needed for another. Those without content go first, then
those that have been idle for longest.
"""

from collections import OrderedDict


class BlockPool:
    """Blocks 0..num_blocks-1. `keys` name what a block holds, so that others who need the same find it."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._num_users = [0] * num_blocks
        self._idle: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))  # the next to be taken first
        self._block_of: dict[bytes, int] = {}
        self._keys_of: dict[int, list[bytes]] = {}

    @property
    def num_idle(self) -> int:
        """Blocks that can be taken now, those with content included."""
        return len(self._idle)

    def find(self, key: bytes) -> int | None:
        """The block that holds this, used or idle."""
        return self._block_of.get(key)

    def is_idle(self, block: int) -> bool:
        """Whether nobody uses it."""
        return block in self._idle

    def take(self) -> int | None:
        """A block for one's own; what it held is forgotten. None where all are in use."""
        if not self._idle:
            return None
        block, _ = self._idle.popitem(last=False)
        for key in self._keys_of.pop(block, ()):
            del self._block_of[key]
        self._num_users[block] = 1
        return block

    def share(self, block: int) -> None:
        """Use a block that was found, beside whoever uses it already."""
        self._idle.pop(block, None)
        self._num_users[block] += 1

    def touch(self, block: int) -> None:
        """What it holds was of use just now: it is to be forgotten last."""
        if block in self._idle:
            self._idle.move_to_end(block)

    def name(self, block: int, key: bytes) -> None:
        """Let others find what a block holds. The first block of that name stays the one that is found."""
        if key not in self._block_of:
            self._block_of[key] = block
            self._keys_of.setdefault(block, []).append(key)

    def release(self, block: int) -> None:
        """Use it no longer."""
        self._num_users[block] -= 1
        if self._num_users[block] == 0:
            self._idle[block] = None
            if block not in self._keys_of:
                self._idle.move_to_end(block, last=False)
