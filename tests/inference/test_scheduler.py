import pytest

from smelt.inference.block_tables import BlockTables
from smelt.inference.scheduler import MAX_OVERTAKING, Plan, Scheduler
from smelt.inference.sequence import Sequence, Status
from smelt.types import SamplingParams


def make(num_blocks: int = 100, block_size: int = 4, max_running: int = 8, max_step_tokens: int = 20) -> Scheduler:
    return Scheduler(BlockTables(num_blocks, block_size), max_running, max_step_tokens)


def asked(num_tokens: int, first: int = 0, owner: str = "ann", is_live: bool = True) -> Sequence:
    """Of tokens that no other has, unless it is told to begin like one."""
    prompt = list(range(first, first + num_tokens))
    return Sequence(prompt, SamplingParams(max_tokens=1000), owner, is_live=is_live)


def of_batch(num_tokens: int, first: int = 0, owner: str = "ann") -> Sequence:
    return asked(num_tokens, first, owner, is_live=False)


def add_all(scheduler: Scheduler, *sequences: Sequence) -> None:
    for sequence in sequences:
        scheduler.add(sequence)


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


def test_batch_prompts_get_a_quarter_of_the_steps_that_have_no_live_ones() -> None:
    scheduler = make(max_step_tokens=80)
    add_all(scheduler, of_batch(50, 100), of_batch(10, 200))
    assert figures(step(scheduler)) == [(200, 10), (100, 10)]
    add_all(scheduler, asked(22, 300), asked(5, 400))
    assert figures(step(scheduler)) == [(200, 1), (400, 5), (300, 22)]
    assert figures(step(scheduler)) == [(300, 1), (400, 1), (200, 1), (100, 20)]
    add_all(scheduler, asked(50, 500))
    assert [figures(step(scheduler))[3:] for _ in range(3)] == [[(500, 37)], [(500, 13)], [(200, 1), (100, 20)]]


def test_a_live_sequence_is_let_in_before_those_of_batches_that_came_earlier() -> None:
    scheduler = make(max_running=2)
    batch = [of_batch(30, 100 * number) for number in range(1, 4)]
    add_all(scheduler, *batch)
    step(scheduler)
    live = asked(3, 1000, "bob")
    scheduler.add(live)
    scheduler.remove(batch[0])
    step(scheduler)
    assert scheduler.running == [live, batch[1]]
    assert scheduler.total_preempted == 0


def test_the_youngest_of_a_batch_gives_up_its_place_to_a_live_one() -> None:
    scheduler = make(max_running=3)
    old, young = of_batch(3, 100), of_batch(3, 200)
    first, second, third = (asked(3, 1000 * number) for number in range(1, 4))
    add_all(scheduler, old, young)
    step(scheduler)
    scheduler.add(first)
    step(scheduler)
    scheduler.add(second)
    assert figures(step(scheduler)) == [(1000, 1), (100, 1), (2000, 3)]
    assert scheduler.running == [first, second, old]
    assert (young.status, young.block_ids) == (Status.WAITING, [])
    scheduler.add(third)
    step(scheduler)
    add_all(scheduler, asked(3, 4000))
    step(scheduler)
    assert scheduler.running == [first, second, third]  # no live one makes way
    scheduler.remove(first)
    scheduler.remove(second)
    step(scheduler)
    assert [each.prompt_ids[0] for each in scheduler.running] == [3000, 4000, 100]


def test_batches_give_blocks_to_live_ones_the_youngest_first() -> None:
    scheduler = make(num_blocks=12)
    old, young = of_batch(12, 100), of_batch(12, 200)
    add_all(scheduler, old, young)
    step(scheduler)
    live = asked(20, 1000)
    scheduler.add(live)
    step(scheduler)
    assert scheduler.running == [live, old]
    while old.status is Status.RUNNING:
        step(scheduler)
    assert (live.status, scheduler.total_preempted) == (Status.RUNNING, 2)
    scheduler.remove(live)
    step(scheduler)
    assert scheduler.running == [old, young]


def test_batches_do_not_make_way_in_vain() -> None:
    scheduler = make(num_blocks=12)
    large, batch = asked(28, 100), of_batch(8, 200)
    add_all(scheduler, large, batch)
    step(scheduler)
    waiting = asked(24, 300)
    scheduler.add(waiting)
    step(scheduler)
    assert scheduler.running == [large, batch]
    scheduler.remove(large)
    step(scheduler)
    assert scheduler.running == [waiting, batch]


def test_a_live_one_does_not_wait_for_a_prefix_that_a_batch_computes() -> None:
    scheduler = make()
    batch, live, other_live, other_of_batch = of_batch(41), asked(41), asked(41), of_batch(41)
    add_all(scheduler, batch, other_of_batch)
    step(scheduler)
    add_all(scheduler, live, other_live)
    assert figures(step(scheduler)) == [(0, 20)]
    assert scheduler.running == [live, batch]  # the others wait for the prefix
    while not (live.output_ids and other_live.output_ids):
        step(scheduler)
    assert other_live.num_cached_tokens == 40
    assert other_of_batch.num_cached_tokens >= 40


def new_live_one(scheduler: Scheduler, number: int) -> Sequence:
    """Comes, and lets no other be computed in the next step."""
    live = asked(20, 1000 * (number + 1), "bob")
    scheduler.add(live)
    step(scheduler)
    return live


def test_one_sequence_of_a_batch_counts_as_live_after_so_many_live_ones() -> None:
    scheduler = make()
    batch = [of_batch(30, 100 * number) for number in range(1, 3)]
    add_all(scheduler, *batch)
    step(scheduler)
    for number in range(MAX_OVERTAKING):
        scheduler.remove(new_live_one(scheduler, number))
    assert [each.num_computed for each in batch] == [5, 0]
    scheduler.remove(new_live_one(scheduler, MAX_OVERTAKING))
    assert [each.num_computed for each in batch] == [15, 0]
    assert [each.is_live for each in batch] == [True, False]


def test_no_batch_waits_for_ever_for_a_place() -> None:
    scheduler = make(max_running=1)
    batch = of_batch(3, 100)
    live = new_live_one(scheduler, 0)
    scheduler.add(batch)
    for number in range(1, MAX_OVERTAKING + 1):
        scheduler.add(following := asked(20, 1000 * (number + 1)))
        scheduler.remove(live)
        step(scheduler)
        live = following
        assert scheduler.running == [live]
    add_all(scheduler, asked(20, 100_000))
    scheduler.remove(live)
    assert figures(step(scheduler)) == [(100, 3)]
    add_all(scheduler, asked(20, 200_000))
    step(scheduler)
    assert scheduler.running == [batch]  # and keeps it


def test_a_batch_alone_gets_all_places_and_counts_nobody() -> None:
    scheduler = make(max_running=3)
    batch = [of_batch(2, 10 * number) for number in range(30)]
    add_all(scheduler, *batch)
    while scheduler.has_work:
        step(scheduler)
        assert len(scheduler.running) == min(3, len(scheduler.running) + scheduler.num_waiting)
        scheduler.remove(scheduler.running[0])
    assert not any(each.is_live for each in batch)
