"""InferenceServer: one thread that owns the models and writes all answers; knows no sockets and no event loop.

    any thread:   submit, cancel          -> commands
    own thread:   commands, then one step of each model with work, then what came of it -> `deliver`
    side threads: loading a model, turning a prompt into tokens; neither holds up the steps of the others

Without work the thread sleeps. A request that fails takes no other with it.
"""

import logging
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from queue import Empty, SimpleQueue

import torch

from smelt.errors import SmeltError, Unavailable
from smelt.inference.answer import Answer
from smelt.inference.events import End, Event, Load, Piece, Request
from smelt.inference.fair_queue import FairQueue
from smelt.inference.service import TextModel
from smelt.types import FinishReason

log = logging.getLogger(__name__)


@dataclass(eq=False, slots=True)
class Job:
    """A request that has not ended. `answer` is there once its prompt is tokens, and begun once it `runs`."""

    key: str
    request: Request
    answer: Answer | None = None
    runs: bool = False


@dataclass(eq=False, slots=True)
class Served:
    """A model, loaded or on its way (`model` is None), and who wants it."""

    model: TextModel | None = None
    arrived: list[Job] = field(default_factory=list)  # before the model did
    waiting: FairQueue[Job] = field(default_factory=FairQueue)
    running: dict[Answer, Job] = field(default_factory=dict)


class InferenceServer:
    """`submit` requests, `cancel` them, `close` at the end. `ended` is done when its thread is, or has met a bug.

    `load` gives the model of a name, or raises why not. `deliver` gets what one round of steps gave, all at once, on
    the server's thread: it must not block.
    """

    def __init__(self, load: Callable[[str], TextModel], deliver: Callable[[list[Event]], None]) -> None:
        self._load = load
        self._deliver = deliver
        self._commands: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._jobs: dict[str, Job] = {}
        self._served: dict[str, Served] = {}
        self._events: list[Event] = []
        self._last_load = Load()
        self.ended: Future[None] = Future()
        # One model at a time: two at once would not be there sooner, and need the memory of both.
        self._loader = ThreadPoolExecutor(1, "model-loader")
        self._encoder = ThreadPoolExecutor(1, "prompt-encoder")
        self._thread = threading.Thread(target=self._work, name="inference", daemon=True)
        self._thread.start()

    def submit(self, key: str, request: Request) -> None:
        """Have a request answered: Pieces, then one End, all with this key, which no other has had."""
        self._commands.put(partial(self._accept, key, request))

    def cancel(self, key: str) -> None:
        """End an answer now; one that has ended already stays as it is."""
        self._commands.put(partial(self._cancel, key))

    def preload(self, model: str) -> None:
        """Load a model before anybody asks for it."""
        self._commands.put(partial(self._begin_loading, model))

    def close(self) -> None:
        """Drop what is running, and end the thread. Nothing is delivered any more."""
        self._commands.put(None)
        self._thread.join()
        for pool in (self._loader, self._encoder):
            pool.shutdown(wait=False, cancel_futures=True)

    def _work(self) -> None:
        try:
            while self._obey():
                for served in self._served.values():
                    self._admit(served)
                    if served.running:
                        self._step(served)
                self._report()
        except Exception as bug:  # noqa: BLE001 - a thread that dies in silence would leave everybody waiting
            self.ended.set_exception(bug)
        else:
            self.ended.set_result(None)

    def _obey(self) -> bool:
        """Do all commands that have come; without work wait for one. False at the end."""
        is_idle = not any(served.running or served.waiting for served in self._served.values())
        try:
            while True:
                command = self._commands.get(block=is_idle)
                if command is None:
                    return False
                command()
                is_idle = False
        except Empty:
            return True

    def _report(self) -> None:
        load = Load(
            tuple(name for name, served in self._served.items() if served.model is not None),
            num_running := sum(len(served.running) for served in self._served.values()),
            len(self._jobs) - num_running,
        )
        if load != self._last_load:
            self._last_load = load
            self._events.append(load)
        events, self._events = self._events, []
        if events:
            self._deliver(events)

    def _accept(self, key: str, request: Request) -> None:
        assert key not in self._jobs, "a key is used once"
        job = self._jobs[key] = Job(key, request)
        self._begin_loading(request.model)
        served = self._served[request.model]
        if served.model is None:
            served.arrived.append(job)
        else:
            self._encode(job, served.model)

    def _begin_loading(self, name: str) -> None:
        """Unless that is done, or under way."""
        if name not in self._served:
            self._served[name] = Served()
            loading = self._loader.submit(self._load, name)
            loading.add_done_callback(lambda done: self._commands.put(partial(self._take_model, name, done)))

    def _take_model(self, name: str, loading: Future[TextModel]) -> None:
        served = self._served[name]
        jobs, served.arrived = served.arrived, []
        if error := loading.exception():
            del self._served[name]  # the next request tries again
            log.warning("cannot load %s: %s", name, error)
            for job in jobs:
                self._fail(job, error)
            return
        served.model = loading.result()
        for job in jobs:
            self._encode(job, served.model)

    def _encode(self, job: Job, model: TextModel) -> None:
        """A long prompt takes its time; meanwhile the answers of others go on."""
        encoding = self._encoder.submit(_answer_to, model, job.request)
        encoding.add_done_callback(lambda done: self._commands.put(partial(self._queue, job, done)))

    def _queue(self, job: Job, encoding: Future[Answer]) -> None:
        if job.key not in self._jobs:
            return  # cancelled meanwhile
        if error := encoding.exception():
            self._fail(job, error)
            return
        job.answer = encoding.result()
        self._served[job.request.model].waiting.push(job.request.owner, job)

    def _admit(self, served: Served) -> None:
        """Fill the free places. Nobody waits inside the engine, where it would be first come, first served."""
        model = served.model
        while model is not None and served.waiting and model.num_free > 0:
            job = served.waiting.pop()
            assert job.answer is not None, "who waits has tokens"
            try:
                model.begin(job.answer)
            except SmeltError as error:
                self._fail(job, error)
                continue
            job.runs = True
            served.running[job.answer] = job

    def _step(self, served: Served) -> None:
        model = served.model
        assert model is not None, "only a model that is loaded has running answers"
        try:
            stepped = model.step()
        except Exception:
            log.exception("a step of %d answers failed; each goes on alone", len(served.running))
            stepped = self._step_one_by_one(served, model)
        self._tell(served, stepped)

    def _step_one_by_one(self, served: Served, model: TextModel) -> list[Answer]:
        """Find the answer that fails, and fail it alone; the others go on where they stood."""
        stepped: list[Answer] = []
        for answer, job in list(served.running.items()):
            _forget_all(model)
            try:
                model.resume(answer)
                stepped += model.step()
            except Exception as error:  # noqa: BLE001 - whatever it was, it is this request's
                del served.running[answer]
                self._fail(job, error)
        _forget_all(model)
        for answer in served.running:
            if answer.finish_reason is None:
                model.resume(answer)
        return stepped

    def _tell(self, served: Served, stepped: Iterable[Answer]) -> None:
        for answer in stepped:
            job = served.running[answer]
            text, token_ids = answer.news()
            self._events.append(Piece(job.key, text, token_ids))
            if answer.finish_reason is not None:
                del served.running[answer]
                self._end(job, answer.finish_reason)

    def _cancel(self, key: str) -> None:
        job = self._jobs.get(key)
        if job is None:
            return
        served = self._served[job.request.model]
        if job.answer is None:
            served.arrived = [other for other in served.arrived if other is not job]
        elif job.runs:
            assert served.model is not None, "it runs there"
            served.model.abort(job.answer)
            del served.running[job.answer]
        else:
            served.waiting.remove(job.request.owner, job)
        self._end(job, "aborted")

    def _fail(self, job: Job, error: BaseException) -> None:
        if not isinstance(error, SmeltError):
            log.error("request %s failed", job.key, exc_info=error)
        self._end(job, "aborted", _explained(error))

    def _end(self, job: Job, reason: FinishReason, error: Exception | None = None) -> None:
        del self._jobs[job.key]
        answer = job.answer
        num_prompt, num_output = (answer.num_prompt_tokens, answer.num_tokens) if answer else (0, 0)
        self._events.append(End(job.key, reason, num_prompt, num_output, error))


def _answer_to(model: TextModel, request: Request) -> Answer:
    if request.messages:
        return model.answer_to_chat(request.messages, request.params)
    return model.answer_to(request.prompt, request.params)


def _forget_all(model: TextModel) -> None:
    model.restart()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # of what the failed step had taken


def _explained(error: BaseException) -> Exception:
    """Memory that is short is not a bug, and may be there again in a moment."""
    words = ("out of memory", "allocate memory")
    if isinstance(error, MemoryError) or any(word in str(error) for word in words):
        return Unavailable("there is not enough memory for this now; ask for less, or try again", retry_after_s=10)
    return error if isinstance(error, Exception) else RuntimeError(type(error).__name__)
