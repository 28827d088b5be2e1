import pytest

from smelt.inference.block_tables import BlockTables
from smelt.inference.scheduler import Plan, Scheduler
from smelt.inference.sequence import Sequence, Status
from smelt.types import SamplingParams


def make(num_blocks: int = 100, block_size: int = 4, max_running: int = 8, max_step_tokens: int = 20) -> Scheduler:
    return Scheduler(BlockTables(num_blocks, block_size), max_running, max_step_tokens)


def asked(num_tokens: int, first: int = 0, owner: str = "ann") -> Sequence:
    """Of tokens that no other has, unless it is told to begin like one."""
    return Sequence(list(range(first, first + num_tokens)), SamplingParams(max_tokens=1000), owner)


def step(scheduler: Scheduler) -> Plan:
    """Plan, and carry out: each sequence that was computed to its end gets a token."""
    plan = scheduler.plan()
    for chunk in plan.chunks:
        was_last = chunk.is_last
        scheduler.tables.mark_computed(chunk.sequence, chunk.end)
        if was_last:
            chunk.sequence.append(0, 0.0, (), 10_000)
    return plan


def figures(plan: Plan) -> list[tuple[int, int]]:
    """(first token of the prompt, tokens computed) of each chunk."""
    return [(chunk.sequence.prompt_ids[0], chunk.num_tokens) for chunk in plan.chunks]


def test_a_long_prompt_comes_in_chunks_and_holds_up_no_stream() -> None:
    scheduler = make(max_step_tokens=40)
    scheduler.add(asked(3, 100))
    step(scheduler)
    scheduler.add(asked(50, 200))
    assert [figures(step(scheduler)) for _ in range(4)] == [
        [(100, 1), (200, 19)],
        [(100, 1), (200, 19)],
        [(100, 1), (200, 12)],
        [(100, 1), (200, 1)],
    ]


def test_a_step_grows_by_the_last_few_tokens_of_a_prompt_but_not_by_more() -> None:
    scheduler = make(max_step_tokens=40)
    scheduler.add(asked(45, 100))
    assert figures(step(scheduler)) == [(100, 45)]
    scheduler.add(asked(25, 200))
    assert figures(step(scheduler)) == [(100, 1), (200, 19)]


def test_owners_share_a_step_whoever_asks_for_more() -> None:
    scheduler = make()
    for number in range(4):
        scheduler.add(asked(40, 100 * number, "ann"))
    step(scheduler)
    scheduler.add(asked(8, 1000, "bob"))
    scheduler.add(asked(30, 2000, "eve"))
    assert figures(step(scheduler)) == [(1000, 6), (2000, 7), (0, 7)]
    assert figures(step(scheduler)) == [(1000, 2), (2000, 9), (0, 9)]


def test_short_prompts_pass_a_long_one_which_keeps_half_of_the_step() -> None:
    scheduler = make()
    for num_tokens, first in ((100, 1000), (7, 100), (6, 200), (3, 300)):
        scheduler.add(asked(num_tokens, first))
    assert figures(step(scheduler)) == [(100, 7), (300, 3), (1000, 10)]
    assert figures(step(scheduler))[2:] == [(1000, 8)]


def test_owners_get_places_in_turns() -> None:
    scheduler = make(max_running=3)
    sequences = [asked(2, 10 * number, "ann") for number in range(5)] + [asked(2, 90, "bob")]
    for sequence in sequences:
        scheduler.add(sequence)
    step(scheduler)
    assert [s.status for s in sequences] == [Status.RUNNING] * 2 + [Status.WAITING] * 3 + [Status.RUNNING]
    assert scheduler.num_waiting == 3


def test_nobody_overtakes_who_waits_for_room() -> None:
    scheduler = make(num_blocks=10)
    small, large, late = asked(8, 100), asked(32, 200, "bob"), asked(4, 300, "eve")
    for sequence in (small, large, late):
        scheduler.add(sequence)
    step(scheduler)
    assert (small.status, large.status, late.status) == (Status.RUNNING, Status.WAITING, Status.WAITING)
    scheduler.remove(small)
    step(scheduler)
    assert large.status is Status.RUNNING


def test_the_youngest_makes_room_and_comes_back_first() -> None:
    scheduler = make(num_blocks=8, max_step_tokens=40)
    old, young = asked(12, 100), asked(10, 200)
    scheduler.add(old)
    scheduler.add(young)
    step(scheduler)
    waiting = asked(4, 300, "bob")
    scheduler.add(waiting)
    while young.status is Status.RUNNING:
        step(scheduler)
    assert (scheduler.total_preempted, old.num_tokens, young.block_ids) == (1, 18, [])
    written = list(young.output_ids)
    scheduler.remove(old)
    step(scheduler)
    assert scheduler.running == [young, waiting]
    assert young.output_ids[: len(written)] == written


def test_who_begins_like_another_waits_until_that_is_computed() -> None:
    scheduler = make()
    first, second, other = asked(40), asked(40), asked(5, 500)
    for sequence in (first, second, other):
        scheduler.add(sequence)
    assert figures(step(scheduler)) == [(500, 5), (0, 15)]
    assert (second.status, other.status) == (Status.WAITING, Status.RUNNING)
    scheduler.remove(other)
    assert [figures(step(scheduler)) for _ in range(2)] == [[(0, 20)], [(0, 5)]]
    plan = step(scheduler)
    assert second.num_cached_tokens == 39
    assert plan.copies == [(first.block_ids[9], second.block_ids[9])]
    assert first.block_ids[:9] == second.block_ids[:9]


@pytest.mark.parametrize("leaves", ["is removed", "is preempted"])
def test_who_waits_for_a_prefix_goes_on_when_its_maker_leaves(leaves: str) -> None:
    scheduler = make()
    first, second = asked(40), asked(40)
    scheduler.add(first)
    scheduler.add(second)
    step(scheduler)
    if leaves == "is removed":
        scheduler.remove(first)
    else:
        scheduler.preempt_all()
    for _ in range(5):
        step(scheduler)
    assert second.output_ids


def test_all_may_begin_anew_in_their_order() -> None:
    scheduler = make()
    sequences = [asked(4, 100 * number) for number in range(3)]
    for sequence in sequences:
        scheduler.add(sequence)
    step(scheduler)
    scheduler.preempt_all()
    scheduler.tables.forget()
    assert (scheduler.running, scheduler.tables.num_used, scheduler.num_waiting) == ([], 0, 3)
    assert figures(step(scheduler)) == [(0, 5), (100, 5), (200, 5)]


def test_removing_takes_from_every_place() -> None:
    scheduler = make(max_running=2)
    sequences = [asked(40), asked(40), *(asked(4, 100 * number) for number in range(1, 4))]
    for sequence in sequences:
        scheduler.add(sequence)
    step(scheduler)
    scheduler.preempt_all()
    for sequence in sequences:
        scheduler.remove(sequence)
    assert not scheduler.has_work
    assert scheduler.plan().chunks == []
