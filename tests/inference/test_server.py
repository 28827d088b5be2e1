"""One thread writes for all: requests join, leave, fail and wait for models without touching each other."""

import random
import threading
import time
from collections.abc import Iterator

import pytest
import torch

from asking import Ask, Client, alone, asked, make_model
from smelt.errors import InvalidInput, NotFound, Overloaded, Unavailable
from smelt.inference.events import End, Event
from smelt.inference.server import InferenceServer
from smelt.types import Grammar, SamplingParams

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def client() -> Iterator[Client]:
    client = Client()
    yield client
    client.server.close()


def test_many_at_once_get_what_each_gets_alone(client: Client) -> None:
    asks = {f"{seed}": asked("ab" * seed, seed, max_tokens=20 + 9 * seed) for seed in range(1, 8)}
    for key, ask in asks.items():
        client.server.submit(key, ask)
    assert {key: client.text(key) for key in asks} == {key: alone(ask) for key, ask in asks.items()}
    assert client.models["gpt"].model.max_rows > 1
    for key, ask in asks.items():
        assert client.ends[key] == End(key, "length", len(ask.prompt), ask.params.max_tokens)
        assert sum(len(piece.token_ids) for piece in client.pieces[key]) == ask.params.max_tokens
    assert client.num_loads == 1


def test_a_request_joins_between_steps(client: Client) -> None:
    client.server.submit("long", asked("x", max_tokens=4000))
    client.begun("long", 3)
    client.server.submit("short", asked("y", max_tokens=5))
    assert client.text("short") == alone(asked("y", max_tokens=5))
    assert "long" not in client.ends
    client.server.cancel("long")
    client.end("long")


def test_cancel_frees_the_place_within_a_step() -> None:
    client = Client(gpt=make_model(block_size=8192))
    for key in "abcd":
        client.server.submit(key, asked(key, max_tokens=8000))
    client.server.submit("waits", asked("w", max_tokens=3))
    client.until_load("gpt", num_running=4, num_waiting=1)
    client.server.cancel("b")
    end = client.end("b")
    assert (end.reason, end.error) == ("aborted", None)
    assert end.num_output_tokens == len(client.pieces["b"])
    client.end("waits")
    for key in ("a", "c", "d", "a", "unknown"):
        client.server.cancel(key)
    for key in "acd":
        client.end(key)
    client.until_load("gpt")
    assert not client.models["gpt"].engine.has_work
    client.server.close()


def test_cancelled_before_it_ran_it_never_runs() -> None:
    may_load = threading.Event()
    client = Client(gpt=lambda: (may_load.wait(), make_model())[1])
    client.server.submit("early", asked("x"))
    client.server.submit("other", asked("y"))
    client.server.cancel("early")
    assert client.end("early") == End("early", "aborted")
    may_load.set()
    assert client.text("other") == alone(asked("y"))
    assert "early" not in client.pieces
    client.server.close()


def test_owners_take_turns() -> None:
    client = Client(gpt=make_model(num_slots=1, block_size=8192))
    client.server.submit("a1", asked("a1", max_tokens=8000, owner="a"))
    client.begun("a1")
    for key in ("a2", "a3", "a4", "b1", "b2"):
        client.server.submit(key, asked(key, max_tokens=2, owner=key[0]))
    client.until_load("gpt", num_running=1, num_waiting=5)
    client.server.cancel("a1")
    client.end("a4")
    assert list(client.ends) == ["a1", "a2", "b1", "a3", "b2", "a4"]
    client.server.close()


def test_a_live_request_takes_the_place_of_a_batch_which_goes_on_to_the_same_text() -> None:
    client = Client(gpt=make_model(num_slots=1))
    of_batch, live = asked("batch", max_tokens=600, is_live=False), asked("live", max_tokens=5, owner="bob")
    client.server.submit("batch", of_batch)
    client.server.submit("other of the batch", asked("c", is_live=False))
    client.begun("batch")
    client.server.submit("live", live)
    assert client.text("live") == alone(live)
    assert not client.ends.keys() - {"live"}
    assert client.text("batch") == alone(of_batch)
    assert client.models["gpt"].engine.stats.total_preempted == 1
    client.server.close()


def test_loading_a_model_holds_up_no_other() -> None:
    may_load = threading.Event()
    client = Client(gpt=make_model(), slow=lambda: (may_load.wait(), make_model())[1])
    client.server.submit("now", asked("x"))
    client.begun("now")
    client.server.submit("1", asked("x", model="slow"))
    client.server.submit("2", asked("y", model="slow"))
    assert client.text("now") == alone(asked("x"))
    client.server.submit("then", asked("y"))
    assert client.text("then") == alone(asked("y"))
    client.until_load("gpt", num_waiting=2)
    assert set(client.ends) == {"now", "then"}
    may_load.set()
    assert [client.text("1"), client.text("2")] == [alone(asked("x")), alone(asked("y"))]
    assert client.num_loads == 2
    client.until_load("gpt", "slow")
    client.server.close()


def test_a_model_that_cannot_be_loaded_fails_its_requests_and_is_tried_again(client: Client) -> None:
    client.models["sick"] = MemoryError()
    client.server.submit("1", asked("x", model="nowhere"))
    client.server.submit("2", asked("x", model="sick"))
    missing, no_memory = client.end("1"), client.end("2")
    assert isinstance(missing.error, NotFound)
    assert isinstance(no_memory.error, Unavailable)
    assert "not enough memory" in str(no_memory.error)
    client.models["sick"] = make_model()
    client.server.submit("3", asked("x", model="sick"))
    assert client.text("3") == alone(asked("x"))


def test_preloading_is_loading_once(client: Client) -> None:
    client.server.preload("gpt")
    client.until_load("gpt")
    client.server.submit("1", asked("x"))
    client.end("1")
    assert client.num_loads == 1


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (asked("x" * 80), "80 tokens, but the model's context is 64"),
        (Ask((5, 900)), "token ids outside of"),
        (Ask(params=SamplingParams(temperature=-1.0)), "temperature"),
        (Ask(params=SamplingParams(max_tokens=0)), "max_tokens"),
    ],
)
def test_what_the_model_cannot_do_fails_alone(client: Client, ask: Ask, message: str) -> None:
    client.server.submit("good", asked("x"))
    client.server.submit("bad", ask)
    end = client.end("bad")
    assert isinstance(end.error, InvalidInput)
    assert message in str(end.error)
    assert end.reason == "aborted"
    assert client.text("good") == alone(asked("x"))


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (RuntimeError("a kernel broke"), RuntimeError),
        (torch.OutOfMemoryError("CUDA out of memory"), Unavailable),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), Unavailable),
    ],
)
def test_poison_fails_alone_and_the_others_go_on_as_if_nothing_had_been(
    client: Client, error: Exception, kind: type[Exception]
) -> None:
    decoder = client.models["gpt"].model
    decoder.poison, decoder.error = 7, error
    client.server.submit("1", asked("first", 1, 60))
    client.server.submit("2", asked("second", 2, 90))
    client.begun("2", 5)
    client.server.submit("bad", Ask((7, 5)))
    client.server.submit("3", asked("third", 3, 20))
    assert type(client.end("bad").error) is kind
    for key, ask in {"1": asked("first", 1, 60), "2": asked("second", 2, 90), "3": asked("third", 3, 20)}.items():
        assert client.text(key) == alone(ask)
        assert client.ends[key].error is None


def test_idle_costs_no_processor_time(client: Client) -> None:
    client.server.submit("1", asked("x", max_tokens=2))
    client.end("1")
    time.sleep(0.1)  # the report after the end
    passes, start = client.models["gpt"].model.num_passes, time.process_time()
    time.sleep(0.5)
    assert time.process_time() - start < 0.1
    assert client.models["gpt"].model.num_passes == passes


def test_close_ends_it_in_the_middle_of_an_answer(client: Client) -> None:
    client.server.submit("1", asked("x", max_tokens=100_000))
    client.begun("1")
    client.server.close()
    assert client.server.ended.done()


def test_a_bug_in_its_own_thread_is_not_silent() -> None:
    def broken(events: list[Event]) -> None:
        raise ZeroDivisionError

    server = InferenceServer(lambda name: make_model(), broken)
    server.submit("1", asked("x"))
    assert isinstance(server.ended.exception(timeout=30), ZeroDivisionError)
    server.close()


def test_a_cancelled_answer_s_blocks_are_free_before_the_next_step() -> None:
    client = Client(gpt=make_model(block_size=8192))
    model = client.models["gpt"]
    client.server.submit("goes", asked("x", max_tokens=8000))
    client.server.submit("stays", asked("y", max_tokens=8000))
    client.begun("stays", 3)
    passes: list[int] = []
    abort = model.abort
    model.abort = lambda answer: (abort(answer), passes.append(model.model.num_passes))
    client.server.cancel("goes")
    asked_at = model.model.num_passes
    client.end("goes")
    assert passes[0] - asked_at <= 1  # the step that was under way
    client.server.close()


def test_a_full_queue_is_said_so() -> None:
    may_load = threading.Event()
    client = Client(max_waiting=2, gpt=lambda: (may_load.wait(), make_model())[1])
    for key in ("1", "2", "3"):
        client.server.submit(key, asked(key))
    error = client.end("3").error
    assert isinstance(error, Overloaded)
    assert "2 requests wait for gpt already" in str(error)
    client.server.submit("promised", asked("p"), is_promised=True)
    may_load.set()
    assert client.text("1") == alone(asked("1"))
    assert client.text("promised") == alone(asked("p"))
    client.server.submit("4", asked("4"))
    assert client.text("4") == alone(asked("4"))
    client.server.close()


def test_models_are_loaded_and_unloaded_when_told(client: Client) -> None:
    client.server.load("l1", "gpt")
    assert client.end("l1") == End("l1", "stop")
    client.server.load("l2", "gpt")
    assert client.end("l2").error is None
    client.server.load("l3", "nowhere")
    assert isinstance(client.end("l3").error, NotFound)
    assert client.num_loads == 2
    client.server.submit("runs", asked("x", max_tokens=200))
    client.begun("runs")
    client.server.unload("u1", "gpt")
    client.server.submit("later", asked("y"))
    client.server.unload("u2", "nowhere")
    assert client.end("u2") == End("u2", "stop")
    client.end("u1")
    assert client.ends["runs"].num_output_tokens == 200
    assert "later" not in client.ends
    assert client.text("later") == alone(asked("y"))
    assert client.num_loads == 3
    client.server.unload("u3", "gpt")
    client.end("u3")
    client.until_load()


def test_two_hundred_who_leave_at_any_moment_leave_nothing_behind() -> None:
    chance = random.Random(1)
    client = Client(gpt=make_model(num_slots=16, block_size=8192))
    for number in range(200):
        changes = {"num_samples": chance.choice([1, 1, 3]), "owner": chance.choice("abc")}
        client.server.submit(f"{number}", asked("x" * chance.randint(1, 300), number, 8000, **changes))
        if chance.random() < 0.5:
            client.server.cancel(f"{chance.randint(0, number)}")
        if chance.random() < 0.1:
            client.take_round()
    for number in range(200):
        client.server.cancel(f"{number}")
    assert {client.end(f"{number}").reason for number in range(200)} == {"aborted"}
    client.until_load("gpt")
    assert client.load.model_loads[0].num_blocks_used == 0
    client.server.submit("last", asked("x"))
    assert len(client.text("last")) == 30
    client.server.close()


def test_a_form_that_becomes_too_expensive_fails_alone(client: Client) -> None:
    """The answer to a hostile expression ends with what is wrong with it; the others go on where they stood."""
    hostile = SamplingParams(max_tokens=50, temperature=1.0, seed=1, grammar=Grammar("regex", "(a{1000}){1000}"))
    client.server.submit("1", asked("first", 1, 60))
    client.begun("1", 3)
    client.server.submit("bad", Ask("x", params=hostile))
    error = client.end("bad").error
    assert isinstance(error, InvalidInput)
    assert error.param == "response_format"
    assert client.text("1") == alone(asked("first", 1, 60))
