"""A lane's turns and gaps, without a worker."""

from smelt.cluster.lanes import Lane, Operation
from smelt.transport.operations import LogEntry


def lane_at(applied: int, *granted: int) -> Lane:
    lane = Lane("s:train:0", applied=applied)
    lane.waiting = {seq: Operation(seq, "optim_step", b"", f"key {seq}") for seq in granted}
    return lane


def seqs(lane: Lane) -> list[int]:
    return [operation.seq for operation in lane.ready()]


def test_what_is_granted_is_done_up_to_the_next_gap() -> None:
    lane = lane_at(3, 4, 5, 7)
    assert seqs(lane) == [4, 5]
    assert not lane.has_gap
    for operation in lane.ready():
        lane.advance(operation)
    assert (seqs(lane), lane.has_gap) == ([], True)


def test_the_log_fills_a_gap_and_what_never_came_counts_as_failed() -> None:
    lane = lane_at(3, 8)
    lane.asked_before = 8
    assert seqs(lane) == []
    lane.take_log((LogEntry(5, "optim_step", b"a"),), is_last=False)
    assert seqs(lane) == []
    lane.take_log((LogEntry(6, "optim_step", b"b", failed=True),), is_last=True)
    assert [(each.seq, each.kind, each.has_failed) for each in lane.ready()] == [
        (4, "forward_backward", True),
        (5, "optim_step", False),
        (6, "optim_step", True),
        (7, "forward_backward", True),
    ]
    for operation in lane.ready():
        assert not lane.is_at_rest
        lane.advance(operation)
    assert seqs(lane) == [8]


def test_only_the_log_that_was_asked_for_is_taken() -> None:
    lane = Lane("a", applied=2, asked_before=7)
    assert lane.expects_log(2, 7)
    assert not lane.expects_log(2, 9), "asked for by the lane that stood here before"
    assert not lane.expects_log(-1, 7)
    assert not Lane("a").expects_log(2, 7)


def test_it_knows_what_it_has_done_or_is_about_to() -> None:
    lane = lane_at(3, 8)
    assert lane.is_beyond(3)
    assert not lane.is_beyond(4)
    lane.asked_before = 8
    assert lane.is_beyond(7)
    assert not lane.is_beyond(8)
    assert not Lane("s:train:0").is_beyond(0)


def test_a_snapshot_is_due_when_replaying_would_take_long() -> None:
    lane = lane_at(-1, *range(100))
    for operation in lane.ready():
        assert not lane.toll.is_high
        lane.advance(operation)
    assert lane.toll.is_high
