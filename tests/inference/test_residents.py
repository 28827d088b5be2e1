"""Which models are in memory: they share a limit, idle ones make way, and files that change are read anew."""

import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import SimpleQueue

import pytest

from asking import Ask, AskVectors
from smelt.configs import DecoderConfig
from smelt.data.characters import ByteTokenizer
from smelt.errors import InvalidInput, NotFound, Unavailable
from smelt.inference.jobs import Embedding, Loading, Writing
from smelt.inference.memory import MIB, Candidate, Upkeep
from smelt.inference.residents import FRESH_SECONDS, Resident, Residents
from smelt.inference.scheduler import MAX_OVERTAKING
from smelt.inference.service import TextModel
from smelt.models.decoder import Decoder
from smelt.types import SamplingParams

CONFIG = DecoderConfig(vocab_size=257, block_size=16, n_layer=1, n_head=1, n_embd=8)


class House:
    """Residents, and what they tell. `files` are the models that exist: their stamps and MiB."""

    def __init__(self, limit: int | None = 100, keep_alive_s: float = 1000.0, patience_s: float = 1000.0) -> None:
        self.files: dict[str, tuple[str, int]] = {"a": ("1", 40), "b": ("1", 40), "c": ("1", 40), "big": ("1", 90)}
        self.calls: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self.told: list[tuple[str, BaseException | None]] = []
        self.loaded: list[str] = []
        self.now = 1000.0
        limit_bytes = None if limit is None else limit * MIB
        upkeep = Upkeep(self.examine, limit_bytes, keep_alive_s, patience_s)
        self.residents = Residents(self.load, upkeep, self.calls.put, self.ready)

    def examine(self, name: str) -> Candidate:
        if name not in self.files:
            raise NotFound(f"no model {name!r}")
        stamp, size = self.files[name]
        return Candidate(((stamp, 0, 0),), size * MIB)

    def load(self, name: str) -> TextModel:
        self.loaded.append(name)
        return TextModel(Decoder(CONFIG), ByteTokenizer())

    def ready(self, resident: Resident, error: BaseException | None) -> None:
        self.told.append((resident.name, error))

    def find(self, name: str, is_busy: bool = False) -> Resident:
        """Ask for a model, and wait until it is there or refused."""
        resident = self.residents.find(name)
        num_told = len(self.told)
        while resident.model is None and len(self.told) == num_told:
            self.calls.get(timeout=10)()
        if is_busy:
            resident.jobs.add(Loading("job"))
        self.now += 1
        return resident

    def rest(self, resident: Resident) -> list[str]:
        resident.jobs.clear()
        return self.residents.rest(resident)

    @property
    def names(self) -> list[str]:
        return [resident.name for resident in self.residents if resident.model is not None]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[House], None]:
    def use(house: House) -> None:
        monkeypatch.setattr("smelt.inference.residents.time.monotonic", lambda: house.now)

    return use


@contextmanager
def house(clock: Callable[[House], None], **options: float | None) -> Iterator[House]:
    house = House(**options)  # type: ignore[arg-type]
    clock(house)
    yield house
    house.residents.close()


def test_idle_models_make_way_the_least_recently_asked_for_first(clock: Callable[[House], None]) -> None:
    with house(clock) as h:
        for name in ("a", "b", "a", "c"):
            h.find(name)
        assert h.names == ["a", "c"]
        assert h.loaded == ["a", "b", "c"]  # a switch between loaded ones loads nothing


def test_a_dropped_model_s_memory_is_free_at_once(clock: Callable[[House], None]) -> None:
    with house(clock) as h:
        model = h.find("a").model
        assert model is not None
        weights = weakref.ref(model.model)
        del model
        h.residents.find("a").leavers.append("key")
        assert h.rest(h.residents.find("a")) == ["key"]
        assert weights() is None


def test_a_busy_model_is_waited_for(clock: Callable[[House], None]) -> None:
    with house(clock) as h:
        busy = h.find("a", is_busy=True)
        h.find("b")
        waiting = h.residents.find("big")
        h.calls.get(timeout=10)()
        assert h.names == ["a", "b"]  # it would not help that b goes
        assert h.told == [("a", None), ("b", None)]
        h.rest(busy)
        while waiting.model is None:
            h.calls.get(timeout=10)()
        assert h.names == ["big"]


def test_patience_ends(clock: Callable[[House], None]) -> None:
    with house(clock, patience_s=5.0) as h:
        h.find("a", is_busy=True)
        h.residents.find("big")
        h.calls.get(timeout=10)()
        assert h.residents.next_tending() == h.now + 5.0
        h.now += 6
        h.residents.tend()
        name, error = h.told[-1]
        assert name == "big"
        assert isinstance(error, Unavailable)
        assert "big needs 90 MiB of memory, and there are 60 MiB for it beside a 40 MiB" in str(error)
        assert h.residents.known("big") is None


def test_what_can_never_fit_is_refused_with_the_figures(clock: Callable[[House], None]) -> None:
    with house(clock) as h:
        h.files["huge"] = ("1", 101)
        h.find("a")
        h.find("huge")
        error = h.told[-1][1]
        assert isinstance(error, InvalidInput)
        assert "huge needs 101 MiB" in str(error)
        assert "int8" in str(error)
        assert h.names == ["a"]  # nobody was unloaded for nothing


def test_what_is_pinned_stays(clock: Callable[[House], None]) -> None:
    with house(clock, keep_alive_s=10.0) as h:
        h.residents.pin("a")
        h.find("a")
        h.find("b")
        h.find("c")
        assert h.names == ["a", "c"]
        h.find("big")
        assert isinstance(h.told[-1][1], InvalidInput)
        h.now += 100
        h.residents.tend()
        assert h.names == ["a"]
        assert h.residents.next_tending() is None


def test_who_is_not_asked_for_leaves(clock: Callable[[House], None]) -> None:
    with house(clock, keep_alive_s=10.0) as h:
        h.find("a")
        h.now += 5
        h.find("b")
        assert h.residents.next_tending() == 1010.0
        h.now = 1010.0
        h.residents.tend()
        assert h.names == ["b"]


def test_files_that_changed_are_read_anew_by_an_idle_model(clock: Callable[[House], None]) -> None:
    with house(clock) as h:
        first = h.find("a", is_busy=True)
        h.files["a"] = ("2", 40)
        h.now += FRESH_SECONDS
        assert h.residents.find("a") is first
        h.rest(first)
        assert h.find("a") is not first
        assert h.loaded == ["a", "a"]
        del h.files["a"]
        h.now += FRESH_SECONDS
        h.find("a")
        assert isinstance(h.told[-1][1], NotFound)
        assert h.names == []


def test_without_a_limit_it_is_what_the_machine_has_free(
    clock: Callable[[House], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    free = [200 * MIB]
    monkeypatch.setattr("smelt.inference.memory.free_memory", lambda _: free[0])
    with house(clock, limit=None) as h:
        h.files = dict.fromkeys("abc", ("1", 80))
        for name in "ab":
            h.find(name)
        assert h.names == ["a", "b"]
        h.find("c")  # the caches of a and b have not been filled yet, but they will be
        assert h.names == ["b", "c"]
        free[0] = 50 * MIB  # somebody else's
        h.files["d"] = ("1", 60)
        h.find("d")
        assert isinstance(h.told[-1][1], Unavailable)
        assert "d needs 60 MiB of memory, and there are 45 MiB for it" in str(h.told[-1][1])


def test_texts_of_batches_become_vectors_when_nobody_waits_and_a_few_times_else() -> None:
    resident = Resident("a", 0.0, 0.0)
    of_batch, live, other = (Embedding(key, AskVectors(("x",), is_live=key != "batch")) for key in ("batch", "l", "o"))
    resident.embedding.append(of_batch)
    assert [resident.next_embedding() for _ in range(3)] == [of_batch] * 3
    resident.embedding.extend((live, other))
    assert [resident.next_embedding() for _ in range(MAX_OVERTAKING + 2)] == [live] * MAX_OVERTAKING + [of_batch, live]
    resident.embedding = deque((of_batch,))
    [answer] = TextModel(Decoder(CONFIG), ByteTokenizer()).answers_to("x", SamplingParams())
    resident.writing[answer] = Writing("w", Ask())
    assert [resident.next_embedding() for _ in range(MAX_OVERTAKING)] == [None] * (MAX_OVERTAKING - 1) + [of_batch]
    answer.sequence.is_live = False
    assert resident.next_embedding() is of_batch


def test_idle_models_make_way_for_a_run_the_least_recently_asked_for_first_and_pinned_ones_last(
    clock: Callable[[House], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("smelt.inference.memory.free_memory", lambda _: 200 * MIB)  # of which 180 are for models
    with house(clock, limit=None) as h:
        h.residents.pin("a")
        for name in ("a", "b", "c"):
            h.find(name)
        assert h.residents.lend(100 * MIB) == ["b"]
        assert h.residents.lend(60 * MIB) == []
        assert h.residents.lend(150 * MIB) == ["c", "a"]
        assert h.names == []
        h.residents.lend(0)
        h.find("a")
        assert h.names == ["a"]  # it is to stay


def test_a_busy_model_makes_way_for_a_run_once_it_is_idle(
    clock: Callable[[House], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("smelt.inference.memory.free_memory", lambda _: 200 * MIB)
    with house(clock, limit=None) as h:
        busy, other = h.find("a", is_busy=True), h.find("b", is_busy=True)
        assert h.residents.lend(150 * MIB) == []
        h.rest(other)
        assert h.names == ["a"]
        h.rest(busy)
        assert h.names == []


@pytest.mark.parametrize("limit", [None, 150])
def test_no_model_grows_into_what_is_lent_to_a_run(
    clock: Callable[[House], None], monkeypatch: pytest.MonkeyPatch, limit: int | None
) -> None:
    free = [200 * MIB]
    monkeypatch.setattr("smelt.inference.memory.free_memory", lambda _: free[0])
    with house(clock, limit=limit) as h:
        h.residents.lend(100 * MIB)
        h.find("a")
        h.find("b")
        free[0] -= 100 * MIB  # the run has taken it: that changes nothing
        h.find("c")
        assert h.names == ["b", "c"]
        h.find("big")
        name, error = h.told[-1]
        assert (name, type(error)) == ("big", Unavailable)
        assert "100 MiB are lent to a run until it ends" in str(error)
        free[0] += 100 * MIB
        h.residents.lend(0)
        h.find("big")
        assert "big" in h.names


def test_what_is_free_now_counts_when_memory_is_lent(
    clock: Callable[[House], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    free = [200 * MIB]
    monkeypatch.setattr("smelt.inference.memory.free_memory", lambda _: free[0])
    with house(clock, limit=None) as h:
        h.find("a")
        free[0] = 50 * MIB  # others have come
        assert h.residents.lend(60 * MIB) == ["a"]
