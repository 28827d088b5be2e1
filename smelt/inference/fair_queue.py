"""A queue that is fair between owners: each gets a turn, whoever asked more often; knows not what waits."""

from collections import OrderedDict, deque
from typing import Generic, TypeVar

T = TypeVar("T")


class FairQueue(Generic[T]):
    """First come, first served for each owner, and the owners in turns."""

    def __init__(self) -> None:
        self._by_owner: OrderedDict[str, deque[T]] = OrderedDict()

    def __bool__(self) -> bool:
        return bool(self._by_owner)

    def __len__(self) -> int:
        return sum(len(items) for items in self._by_owner.values())

    def push(self, owner: str, item: T) -> None:
        """Put an item at the end of its owner's."""
        self._by_owner.setdefault(owner, deque()).append(item)

    def pop(self) -> T:
        """The next item of the owner whose turn it is; there must be one."""
        owner, items = next(iter(self._by_owner.items()))
        item = items.popleft()
        del self._by_owner[owner]
        if items:
            self._by_owner[owner] = items  # behind all others
        return item

    def remove(self, owner: str, item: T) -> None:
        """Take an item out that is there."""
        self._by_owner[owner].remove(item)
        if not self._by_owner[owner]:
            del self._by_owner[owner]
