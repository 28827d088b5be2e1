"""Residents: the models in memory and those on their way, within a limit; knows no requests, only who waits or works.

A model is examined and loaded beside the server's thread; everything else here happens on that thread. Where memory
is short, idle models make way, the one that was asked for longest ago first. A busy one never does: who needs its
place waits, for some time. For runs that train on the same device they make way too, and none comes in their place.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import torch

from smelt.errors import InvalidInput, SmeltError, Unavailable
from smelt.inference.answer import Answer
from smelt.inference.classifier import Classifying, TextClassifier, fill_slice
from smelt.inference.jobs import Embedding, Job, Writing
from smelt.inference.memory import MIB, Candidate, Room, Upkeep
from smelt.inference.sample_jobs import Sampling
from smelt.inference.scheduler import MAX_OVERTAKING
from smelt.inference.service import TextModel
from smelt.types import ModelLoad

FRESH_SECONDS = 1.0  # for which files are trusted to be as they were

T = TypeVar("T")

log = logging.getLogger(__name__)


@dataclass(eq=False, slots=True)
class Resident:
    """A model, or its place while `model` is None, and who wants it."""

    name: str
    used_at: float  # on the monotonic clock, as are all times here
    examined_at: float
    model: TextModel | TextClassifier | None = None
    candidate: Candidate = Candidate()
    is_reserved: bool = False  # its memory counts as taken
    arrived: list[Job] = field(default_factory=list)  # before the model did, or since it is to leave
    jobs: set[Job] = field(default_factory=set)  # that it works on
    writing: dict[Answer, Writing | Sampling] = field(default_factory=dict)
    embedding: deque[Embedding] = field(default_factory=deque)
    num_overtaking: int = 0  # live slices and steps that texts of batches have let pass
    classifying: list[Classifying] = field(default_factory=list)
    gathers_until: float = 0.0  # more texts to classify, which are computed together
    leavers: list[str] = field(default_factory=list)  # keys of those who wait for it to be gone
    short_since: float | None = None  # since when it waits for memory

    @property
    def is_idle(self) -> bool:
        """Whether it may go without anybody losing anything."""
        return self.model is not None and not self.jobs

    def next_embedding(self) -> Embedding | None:
        """Whose slice of texts is next. Those of batches let live ones and live answers go first, but not for ever."""
        live = next((job for job in self.embedding if job.request.is_live), None)
        other = next((job for job in self.embedding if not job.request.is_live), None)
        is_free = live is None and not any(answer.sequence.is_live for answer in self.writing)
        if other is None or not (is_free or self.num_overtaking == MAX_OVERTAKING):
            self.num_overtaking += other is not None
            return live
        self.num_overtaking = 0
        return other

    @property
    def classifies_at(self) -> float | None:
        """When the next pass over texts is due: at once where they fill it. None without any."""
        if not self.classifying:
            return None
        return 0.0 if fill_slice(self.classifying) else self.gathers_until

    @property
    def load(self) -> ModelLoad:
        """What a loaded model does now."""
        assert self.model is not None, "it is loaded"
        if isinstance(self.model, TextClassifier):  # it has no cache, and what it does is done in a moment
            return ModelLoad(self.name, self.candidate.num_bytes, 0, 0, 0, 0, 0, 0)
        stats = self.model.engine.stats
        return ModelLoad(
            self.name,
            self.candidate.num_bytes,
            stats.num_blocks,
            stats.num_blocks_used,
            stats.batch_size,
            stats.total_prompt_tokens,
            stats.total_cached_tokens,
            stats.total_preempted,
        )


class Residents:
    """`find` gives a model's place, and sees to it that the model comes: `ready` is called then, or with the reason
    why it does not. `later` brings a call from another thread to the server's."""

    def __init__(
        self,
        load: Callable[[str], TextModel | TextClassifier],
        upkeep: Upkeep,
        later: Callable[[Callable[[], None]], None],
        ready: Callable[[Resident, BaseException | None], None],
    ) -> None:
        self._load = load
        self._upkeep = upkeep
        self._later = later
        self._ready = ready
        self._room = Room(upkeep)
        self._by_name: dict[str, Resident] = {}
        self._pinned: set[str] = set()
        # One model at a time: two at once would not be there sooner, and need the memory of both.
        self._loader = ThreadPoolExecutor(1, "model-loader")

    def __iter__(self) -> Iterator[Resident]:
        return iter(list(self._by_name.values()))

    def find(self, name: str) -> Resident:
        """The place of a model, which begins to load unless it is there; an idle one whose files changed, anew."""
        resident = self._by_name.get(name)
        if resident is not None and resident.is_idle and self._has_changed(resident):
            log.info("the files of %s have changed: it is loaded anew", name)
            self._drop(resident)
            resident = None
        if resident is None:
            resident = self._by_name[name] = Resident(name, time.monotonic(), time.monotonic())
            self._beside(partial(self._upkeep.examine, name), partial(self._take_candidate, resident))
        resident.used_at = time.monotonic()
        return resident

    def known(self, name: str) -> Resident | None:
        """The place of a model that is loaded or on its way."""
        return self._by_name.get(name)

    def pin(self, name: str) -> None:
        """Have a model ready, and keep it whatever others need."""
        self._pinned.add(name)
        self.find(name)

    def rest(self, resident: Resident) -> list[str]:
        """To be called when a job of it has ended. If that makes it go, the keys of those who wait for that."""
        resident.used_at = time.monotonic()
        if not resident.is_idle:
            return []
        if resident.leavers:
            self._drop(resident)
        self._make_way()
        self._help_the_short()
        return resident.leavers

    @property
    def num_lent(self) -> int:
        """Bytes that are left to runs."""
        return self._room.num_lent

    def lend(self, num_bytes: int) -> list[str]:
        """Leave so many bytes to runs, from now on; 0: to none any more. Names the idle models that made way for that.

        Busy ones do so when they have become idle. Those that are to stay come back when no run needs memory any more.
        """
        was_lent, self._room.num_lent = self._room.num_lent, num_bytes
        unloaded = self._make_way(num_bytes)
        self._help_the_short()
        if was_lent and not num_bytes:
            for name in self._pinned:
                self.find(name)
        return unloaded

    def tend(self) -> None:
        """Unload what nobody asked for in a long time, and let who waits for memory know that it is in vain."""
        now = time.monotonic()
        for resident in self:
            if resident.is_idle and self._leaves_at(resident) <= now:
                log.info("unloaded %s: nobody asked for it in %g s", resident.name, self._upkeep.keep_alive_s)
                self._drop(resident)
                self._help_the_short()
            elif resident.short_since is not None and resident.short_since + self._upkeep.patience_s <= now:
                self._refuse(resident, Unavailable(self._shortage(resident), retry_after_s=10))

    def next_tending(self) -> float | None:
        """When `tend` has something to do, on the monotonic clock; None while that is never."""
        ends = [self._leaves_at(resident) for resident in self if resident.is_idle]
        ends += [r.short_since + self._upkeep.patience_s for r in self if r.short_since is not None]
        return min((end for end in ends if end < float("inf")), default=None)

    def close(self) -> None:
        """Load nothing any more."""
        self._loader.shutdown(wait=False, cancel_futures=True)

    def _leaves_at(self, resident: Resident) -> float:
        return float("inf") if resident.name in self._pinned else resident.used_at + self._upkeep.keep_alive_s

    def _has_changed(self, resident: Resident) -> bool:
        now = time.monotonic()
        if now - resident.examined_at < FRESH_SECONDS:
            return False
        resident.examined_at = now
        try:
            return self._upkeep.examine(resident.name).stamp != resident.candidate.stamp
        except (SmeltError, OSError):
            return True  # loading it says what is wrong

    def _beside(self, work: Callable[[], T], take: "Callable[[Future[T]], None]") -> None:
        self._loader.submit(work).add_done_callback(lambda done: self._later(partial(take, done)))

    def _take_candidate(self, resident: Resident, examined: "Future[Candidate]") -> None:
        if error := examined.exception():
            self._refuse(resident, error)
            return
        resident.candidate = examined.result()
        self._make_room(resident)

    def _make_room(self, resident: Resident) -> None:
        """Begin to load, after idle models have made way; wait where busy ones would have to; or refuse."""
        movable = [r for r in self if r.is_reserved and r.name not in self._pinned]
        idle = sorted((r for r in movable if r.is_idle), key=lambda r: r.used_at)
        while idle and not self._fits(resident) and self._fits(resident, without=idle):
            log.info("unloaded %s to make room for %s", idle[0].name, resident.name)
            self._drop(idle.pop(0))
        if self._fits(resident):
            resident.short_since, resident.is_reserved = None, True
            self._beside(partial(self._load, resident.name), partial(self._take_model, resident))
        elif self._fits(resident, without=[r for r in movable if r.is_reserved]):
            resident.short_since = resident.short_since or time.monotonic()
        else:
            num_staying = self._num_taken - sum(r.candidate.num_bytes for r in movable)
            can_never = resident.candidate.num_bytes > self._room.most - num_staying
            shortage = self._shortage(resident)
            self._refuse(resident, InvalidInput(shortage, "model") if can_never else Unavailable(shortage, 10))

    def _make_way(self, num_needed: int = 0) -> list[str]:
        """Unload idle models, the one asked for longest ago first, while runs lack memory; `num_needed`: right now.

        Those that are to stay come last.
        """
        idle = sorted((r for r in self if r.is_idle), key=lambda r: (r.name in self._pinned, r.used_at))
        unloaded = []
        while idle and (self._room.is_overdrawn(self._num_taken) or self._room.free < num_needed):
            log.info("unloaded %s: a run needs the memory", idle[0].name)
            unloaded.append(idle[0].name)
            self._drop(idle.pop(0))
        return unloaded

    def _fits(self, resident: Resident, without: Iterable[Resident] = ()) -> bool:
        given_back = sum(other.candidate.num_bytes for other in without)
        return resident.candidate.num_bytes <= self._room.left(self._num_taken) + given_back

    @property
    def _num_taken(self) -> int:
        return sum(resident.candidate.num_bytes for resident in self if resident.is_reserved)

    def _shortage(self, resident: Resident) -> str:
        taken = ", ".join(f"{r.name} {r.candidate.num_bytes / MIB:,.0f} MiB" for r in self if r.is_reserved)
        return (
            f"{resident.name} needs {resident.candidate.num_bytes / MIB:,.0f} MiB of memory, and there are "
            f"{max(0, self._room.left(self._num_taken)) / MIB:,.0f} MiB for it"
            + (f" beside {taken}" if taken else "")
            + (f"; {self._room.num_lent / MIB:,.0f} MiB are lent to a run until it ends" if self._room.num_lent else "")
            + "; quantize it to int8, give it a smaller cache (kv_cache_mb), or serve it on another machine"
        )

    def _take_model(self, resident: Resident, loading: "Future[TextModel | TextClassifier]") -> None:
        if error := loading.exception():
            self._refuse(resident, error)
            return
        resident.model = loading.result()
        resident.used_at = time.monotonic()
        self._ready(resident, None)

    def _refuse(self, resident: Resident, error: BaseException) -> None:
        log.warning("cannot load %s: %s", resident.name, error)
        self._drop(resident)  # the next request tries again
        self._ready(resident, error)
        self._help_the_short()

    def _drop(self, resident: Resident) -> None:
        self._by_name.pop(resident.name, None)
        resident.model, resident.is_reserved = None, False
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _help_the_short(self) -> None:
        for resident in self:
            if resident.short_since is not None:
                self._make_room(resident)
