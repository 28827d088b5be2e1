"""InferenceServer: one thread that owns the models and does all jobs; knows no sockets and no event loop.

    any thread:   submit, embed, load, unload, cancel  -> commands
    own thread:   commands, then one step of each model with work, then what came of it -> `deliver`
    side threads: loading a model, turning text and conversations into tokens; neither holds up the steps of the others

Between the steps a companion does work of its own on the same thread and models, a bounded piece at a time.

Without work the thread sleeps. A request that fails takes no other with it.
"""

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Protocol

from smelt.errors import Overloaded, SmeltError
from smelt.inference.answer import Answer
from smelt.inference.classifier import Classifying, TextClassifier, classify_slice
from smelt.inference.events import ClassifyRequest, EmbedRequest, End, Event, Load, MadeWay, RenderRequest, Request
from smelt.inference.jobs import Embedding, Job, Loading, Rendering, Writing, explained, mismatch
from smelt.inference.memory import Upkeep
from smelt.inference.residents import Resident, Residents
from smelt.inference.sample_jobs import Holding, Sampling
from smelt.inference.sequence import Status
from smelt.inference.service import TextModel

MAX_WAITING = 512  # requests of one model that have not begun
# After texts were classified, in parts of what that took: who was answered may ask again, and one pass of many texts is
# faster than several of few.
GATHERING = 1 / 16
REPORT_SECONDS = 0.25  # between two reports of the load, at least

log = logging.getLogger(__name__)


class Companion(Protocol):
    """Work beside the answers, on the server's thread. It must not raise."""

    def next_turn(self) -> float | None:
        """When it has something to do, on the monotonic clock; None until something comes."""

    def step(self, *, is_shared: bool) -> None:
        """Do a bounded piece of it: a small one while answers are being written."""


class InferenceServer:
    """`submit` requests, `cancel` them, `close` at the end. `ended` is done when its thread is, or has met a bug.

    `load` gives the model of a name, or raises why not. `deliver` gets what one round of steps gave, all at once, on
    the server's thread: it must not block.
    """

    def __init__(
        self,
        load: Callable[[str], TextModel | TextClassifier],
        deliver: Callable[[list[Event]], None],
        upkeep: Upkeep | None = None,
        max_waiting: int = MAX_WAITING,
    ) -> None:
        self._deliver = deliver
        self._home: Path | None = None
        self._max_waiting = max_waiting
        self._commands: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._jobs: dict[str, tuple[Job, Resident]] = {}
        self._residents = Residents(load, upkeep or Upkeep(), self._commands.put, self._greet)
        self._companion: Companion | None = None
        self._events: list[Event] = []
        self._last_load = Load()
        self._looked_at = float("-inf")
        self._owes_load = False
        self.ended: Future[None] = Future()
        # Two, so that short texts need not wait for a long one.
        self._encoder = ThreadPoolExecutor(1, "prompt-encoder")
        self._long_encoder = ThreadPoolExecutor(1, "long-prompt-encoder")
        self._renderer = ThreadPoolExecutor(1, "conversation-renderer")  # a request's may take it seconds
        self._thread = threading.Thread(target=self._work, name="inference", daemon=True)
        self._thread.start()

    def submit(self, key: str, request: Request, is_promised: bool = False) -> None:
        """Have a request answered: Pieces, then an End of each answer, all with this key, which no other has had.

        One that `is_promised` may wait however many do.
        """
        self._commands.put(partial(self._accept, Writing(key, request, self._home), request.model, is_promised))

    def embed(self, key: str, request: EmbedRequest) -> None:
        """Have texts turned into vectors: Vectors, then one End."""
        self._commands.put(partial(self._accept, Embedding(key, request), request.model))

    def render(self, key: str, request: RenderRequest) -> None:
        """Have conversations turned into data to train on: RenderedData, then one End."""
        self._commands.put(partial(self._accept, Rendering(key, request), request.model))

    def classify(self, key: str, request: ClassifyRequest) -> None:
        """Have texts told apart: Scores, then one End."""
        self._commands.put(partial(self._accept, Classifying(key, request), request.model))

    def load(self, key: str, model: str) -> None:
        """Have a model ready to answer. An End says when it is, or why it cannot be."""
        self._commands.put(partial(self._accept, Loading(key), model))

    def unload(self, key: str, model: str) -> None:
        """Give a model's memory back once what it works on has ended. An End says when."""
        self._commands.put(partial(self._unload, key, model))

    def lend(self, key: str, num_bytes: int) -> None:
        """Leave so much of the memory to runs, until another number is told: MadeWay, then one End."""
        self._commands.put(partial(self._lend, key, num_bytes))

    def sample(self, key: str, model: str, sampling: Sampling) -> None:
        """Have raw tokens drawn: Samples, then one End."""
        self._commands.put(partial(self._accept, sampling, model, is_promised=True))

    def do(self, call: Callable[[], None]) -> None:
        """Have something done on the server's thread."""
        self._commands.put(call)

    def accompany(self, companion: Companion, home: Path) -> None:
        """Let a companion work beside the answers, from now on. Adapters of requests are folders below `home`."""
        self._companion, self._home = companion, home

    def hold(self, model: str, holding: Holding) -> None:
        """Have a model come and stay, on the server's thread."""
        self._give(holding, self._residents.find(model))

    def release(self, holding: Holding) -> None:
        """Let a model leave that was held, on the server's thread."""
        if holding.key in self._jobs:
            self._forget(holding)

    def cancel(self, key: str) -> None:
        """End a request now; one that has ended already stays as it is."""
        self._commands.put(partial(self._cancel, key))

    def preload(self, model: str) -> None:
        """Load a model before anybody asks for it, and keep it."""
        self._commands.put(partial(self._residents.pin, model))

    def close(self) -> None:
        """Drop what is running, and end the thread. Nothing is delivered any more."""
        self._commands.put(None)
        self._thread.join()
        self._residents.close()
        for pool in (self._encoder, self._long_encoder, self._renderer):
            pool.shutdown(wait=False, cancel_futures=True)

    # --- The thread ----------------------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            while self._obey():
                for resident in self._residents:
                    self._step(resident)
                self._accompany()
                self._residents.tend()
                self._report()
        except Exception as bug:  # noqa: BLE001 - a thread that dies in silence would leave everybody waiting
            self.ended.set_exception(bug)
        else:
            self.ended.set_result(None)

    def _obey(self) -> bool:
        """Do all commands that have come; without work wait for one. False at the end."""
        try:
            command = self._commands.get(timeout=self._seconds_to_sleep())
            while command is not None:
                command()
                command = self._commands.get_nowait()
        except Empty:
            return True
        return False

    def _seconds_to_sleep(self) -> float | None:
        """None for as long as no command comes."""
        if any(resident.writing or resident.embedding for resident in self._residents):
            return 0
        wakes = [
            *(resident.classifies_at for resident in self._residents),
            self._residents.next_tending(),
            None if self._companion is None else self._companion.next_turn(),
            self._looked_at + REPORT_SECONDS if self._owes_load else None,
        ]
        times = [wake for wake in wakes if wake is not None]
        return max(0.0, min(times) - time.monotonic()) if times else None

    def _accompany(self) -> None:
        """Let the companion have its turn."""
        turn = None if self._companion is None else self._companion.next_turn()
        if self._companion is not None and turn is not None and turn <= time.monotonic():
            self._companion.step(is_shared=any(resident.writing for resident in self._residents))

    def _step(self, resident: Resident) -> None:
        if resident.writing:
            for answer in self._stepped(resident):
                job = resident.writing[answer]
                if answer.finish_reason is not None:
                    del resident.writing[answer]
                self._events += job.events_of(answer)
                if job.has_ended:
                    self._forget(job)
        if resident.embedding and (embedding := resident.next_embedding()) is not None:
            self._embed_slice(resident, embedding)
        began = time.monotonic()
        if resident.classifies_at is not None and resident.classifies_at <= began:
            self._classify_slice(resident)
            ended = time.monotonic()
            resident.gathers_until = ended + (ended - began) * GATHERING

    def _stepped(self, resident: Resident) -> list[Answer]:
        assert isinstance(resident.model, TextModel), "only a model that is loaded and writes has running answers"
        try:
            return resident.model.step()
        except Exception as error:  # noqa: BLE001 - whatever it was, somebody's request is the reason
            return self._step_one_by_one(resident, resident.model, error)

    def _step_one_by_one(self, resident: Resident, model: TextModel, error: Exception) -> list[Answer]:
        """After a step that failed find who it was, and fail that request alone; the others go on where they stood."""
        running = [answer for answer in resident.writing if answer.sequence.status is not Status.WAITING]
        is_refusal = isinstance(error, SmeltError)
        log.warning("a step of %d answers failed; each goes on alone", len(running), exc_info=not is_refusal and error)
        model.pause(keeps_cache=is_refusal)
        # What refuses is a grammar that has become too expensive, nearly always: then the others need not be tried.
        suspects = [answer for answer in running if is_refusal and answer.sequence.grammar is not None]
        tried = self._step_each(resident, model, suspects)
        if all(answer in resident.writing for answer in suspects):
            tried += self._step_each(resident, model, [answer for answer in running if answer not in suspects])
        for answer in resident.writing:
            if answer.finish_reason is None:
                model.resume(answer)
        return [answer for answer in tried if answer in resident.writing]

    def _step_each(self, resident: Resident, model: TextModel, answers: list[Answer]) -> list[Answer]:
        for answer in answers:
            if answer not in resident.writing:
                continue  # its request has failed
            try:
                model.step_alone(answer)
            except Exception as error:  # noqa: BLE001 - whatever it was, it is this request's
                self._fail(resident.writing[answer], error)
        return answers

    def _embed_slice(self, resident: Resident, job: Embedding) -> None:
        """One slice; the others follow in turns."""
        resident.embedding.remove(job)
        try:
            events = job.step()
        except Exception as error:  # noqa: BLE001 - whatever it was, it is this request's
            self._fail(job, error)
            return
        self._events += events
        if events:
            self._forget(job)
        else:
            resident.embedding.append(job)

    def _classify_slice(self, resident: Resident) -> None:
        """One pass over the texts of many requests. Where that fails each goes on alone, so that one fails alone."""
        assert isinstance(resident.model, TextClassifier), "only a classifier has texts to classify"
        try:
            jobs = classify_slice(resident.model, resident.classifying)
        except Exception:
            log.warning("texts of %d requests failed; each goes on alone", len(resident.classifying), exc_info=True)
            jobs = self._classify_each(resident, resident.model)
        for job in jobs:
            resident.classifying.remove(job)
            if job.is_done:
                self._events += job.events()
                self._forget(job)
            else:
                resident.classifying.append(job)  # in turns: nobody waits for somebody's hundred texts

    def _classify_each(self, resident: Resident, model: TextClassifier) -> list[Classifying]:
        for job in resident.classifying.copy():
            try:
                classify_slice(model, [job])
            except Exception as error:  # noqa: BLE001 - whatever it was, it is this request's
                self._fail(job, error)
        return resident.classifying.copy()

    # --- Requests ------------------------------------------------------------------------------------------

    def _accept(self, job: Job, name: str, is_promised: bool = False) -> None:
        assert job.key not in self._jobs, "a key is used once"
        resident = self._residents.find(name)
        num_waiting = len(resident.arrived) + sum(not other.has_begun for other in resident.jobs)
        if num_waiting >= self._max_waiting and not is_promised:
            error = Overloaded(f"{num_waiting} requests wait for {name} already; try again in a moment", 5)
            self._events.append(job.aborted(error))
            return
        self._give(job, resident)

    def _give(self, job: Job, resident: Resident) -> None:
        self._jobs[job.key] = job, resident
        if resident.model is None or resident.leavers:
            resident.arrived.append(job)
        else:
            self._hand_over(job, resident, resident.model)

    def _greet(self, resident: Resident, error: BaseException | None) -> None:
        """A model has come, or cannot."""
        jobs, resident.arrived = resident.arrived, []
        for job in jobs:
            if resident.model is None:
                self._fail(job, error or RuntimeError("no model"))
            else:
                self._hand_over(job, resident, resident.model)
        self._rest(resident)

    def _hand_over(self, job: Job, resident: Resident, model: TextModel | TextClassifier) -> None:
        """A long prompt takes its time to become tokens; meanwhile the answers of others go on."""
        if isinstance(job, Loading):
            del self._jobs[job.key]
            self._events.append(End(job.key, "stop"))
            return
        resident.jobs.add(job)
        if (wrong := mismatch(job, resident.name, model)) is not None:
            self._fail(job, wrong)
            return
        if isinstance(job, Holding):
            assert isinstance(model, TextModel), "that it is no classifier was checked"
            job.come(model)
            return
        prepare: Callable[..., None] = job.prepare
        prepared = self._encoder_for(job).submit(prepare, model)
        prepared.add_done_callback(lambda done: self._commands.put(partial(self._begin, job, resident, done)))

    def _encoder_for(self, job: Writing | Sampling | Embedding | Rendering | Classifying) -> ThreadPoolExecutor:
        if isinstance(job, Rendering):
            return self._renderer
        return self._long_encoder if job.is_long else self._encoder

    def _begin(
        self,
        job: Writing | Sampling | Embedding | Rendering | Classifying,
        resident: Resident,
        prepared: "Future[None]",
    ) -> None:
        if job.key not in self._jobs:
            return  # cancelled meanwhile
        error = prepared.exception()
        if error is None and isinstance(job, Embedding):
            resident.embedding.append(job)
        elif error is None and isinstance(job, Classifying):
            resident.classifying.append(job)
        elif error is None and isinstance(job, Rendering):
            self._events += job.events()
            self._forget(job)
        elif error is None and isinstance(job, Writing | Sampling):
            error = self._begin_writing(job, resident)
        if error is not None:
            self._fail(job, error)

    def _begin_writing(self, job: Writing | Sampling, resident: Resident) -> Exception | None:
        assert isinstance(resident.model, TextModel), "a model does not leave while it has jobs"
        try:
            job.bring_adapter(resident.model)
            for answer in job.answers:
                resident.model.begin(answer)
                resident.writing[answer] = job
        except Exception as error:  # noqa: BLE001 - what is wrong with the request
            return error
        return None

    def _unload(self, key: str, name: str) -> None:
        resident = self._residents.known(name)
        if resident is None:
            self._events.append(End(key, "stop"))
        else:
            resident.leavers.append(key)
            for job in resident.jobs.copy():
                if isinstance(job, Holding):
                    job.leave()
            self._rest(resident)

    def _lend(self, key: str, num_bytes: int) -> None:
        self._events += [MadeWay(key, tuple(self._residents.lend(num_bytes))), End(key, "stop")]

    def _cancel(self, key: str) -> None:
        if key in self._jobs:
            job, _ = self._jobs[key]
            self._abort(job)
            self._events.append(job.aborted())

    def _fail(self, job: Job, error: BaseException) -> None:
        self._abort(job)
        explanation = explained(error, job.key)
        self._events.append(job.aborted(explanation))
        if isinstance(job, Holding):
            job.refused(explanation)

    def _abort(self, job: Job) -> None:
        """Take a job out of wherever it is."""
        _, resident = self._jobs[job.key]
        if job in resident.arrived:
            resident.arrived.remove(job)
        if isinstance(job, Embedding) and job in resident.embedding:
            resident.embedding.remove(job)
        if isinstance(job, Classifying) and job in resident.classifying:
            resident.classifying.remove(job)
        for answer in job.answers if isinstance(job, Writing | Sampling) else ():
            if resident.writing.pop(answer, None) is not None and isinstance(resident.model, TextModel):
                resident.model.abort(answer)
        self._forget(job)

    def _forget(self, job: Job) -> None:
        """A job has ended."""
        _, resident = self._jobs.pop(job.key)
        resident.jobs.discard(job)
        self._rest(resident)

    def _rest(self, resident: Resident) -> None:
        """If nothing is left to do for it, a model may have to leave; who has come since then waits for it anew."""
        leavers = self._residents.rest(resident)
        self._events += [End(key, "stop") for key in leavers]
        if leavers:
            for job in resident.arrived:
                self._give(job, self._residents.find(resident.name))

    # --- The load ------------------------------------------------------------------------------------------

    def _report(self) -> None:
        """Deliver what there is; the load too, a few times a second at most unless models have come or gone."""
        now = time.monotonic()
        loaded = [resident for resident in self._residents if resident.model is not None]
        is_early = now - self._looked_at < REPORT_SECONDS
        self._owes_load = is_early and tuple(resident.name for resident in loaded) == self._last_load.models
        if not self._owes_load:
            self._looked_at = now
            self._report_load(loaded)
        events, self._events = self._events, []
        if events:
            self._deliver(events)

    def _report_load(self, loaded: list[Resident]) -> None:
        answers = [answer for resident in loaded for answer in resident.writing]
        num_waiting = sum(answer.sequence.status is Status.WAITING for answer in answers)
        num_preparing = sum(_is_preparing(job) for job, _ in self._jobs.values())
        load = Load(
            tuple(resident.name for resident in loaded),
            len(answers) - num_waiting,
            num_waiting + num_preparing,
            tuple(resident.load for resident in loaded),
            self._residents.num_lent,
        )
        if load != self._last_load:
            self._last_load = load
            self._events.append(load)


def _is_preparing(job: Job) -> bool:
    if isinstance(job, Writing | Sampling):
        return not job.answers
    return not isinstance(job, Holding)
