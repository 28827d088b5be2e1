"""Owners take turns; each owner's items keep their order."""

from smelt.inference.fair_queue import FairQueue


def drained(queue: FairQueue[str]) -> list[str]:
    items = []
    while queue:
        items.append(queue.pop())
    return items


def test_one_who_asks_much_waits_behind_one_who_asks_little() -> None:
    queue: FairQueue[str] = FairQueue()
    for item in ("a1", "a2", "a3", "b1", "c1", "c2"):
        queue.push(item[0], item)
    assert queue.pop() == "a1"
    queue.push("d", "d1")
    assert drained(queue) == ["b1", "c1", "a2", "d1", "c2", "a3"]


def test_what_is_removed_does_not_come() -> None:
    queue: FairQueue[str] = FairQueue()
    for item in ("a1", "b1", "a2"):
        queue.push(item[0], item)
    queue.remove("b", "b1")
    queue.remove("a", "a1")
    assert drained(queue) == ["a2"]
    assert not queue
