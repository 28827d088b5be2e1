"""A process that renders chat templates and may be killed at any moment; knows no models.

A template is a program that came with a model. It gets a process without a database, a model or a file of ours, with
limits on memory and time, and a fresh one after it has exceeded them. The process ends with its starter: what it reads
from has then ended, and a rendering that goes on has few seconds of CPU time left.

    python -m smelt.data.template_process    reads requests and writes answers, each with its length before it
"""

import resource
import select
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping
from typing import IO, Any, Protocol

import msgspec

from smelt import errors
from smelt.data.templates import MAX_CHARS, render
from smelt.errors import InvalidInput, Unavailable, UnsupportedModel

MAX_SECONDS = 2.0  # of a rendering; milliseconds are usual
START_SECONDS = 10.0  # of Python's start, on a machine that does other things
MAX_MEMORY = 512 * 2**20  # bytes of address space; Python itself needs about 50 MB
MAX_ANSWER = 4 * MAX_CHARS + 1024  # bytes: UTF-8 has at most 4 for a character
LENGTH_BYTES = 4


class Request(msgspec.Struct, frozen=True):
    """What to render."""

    template: str
    variables: dict[str, Any]


class Answer(msgspec.Struct, frozen=True):
    """The rendered text, or the name of the error that it became."""

    text: str
    error: str | None = None
    param: str | None = None


class Renderer(Protocol):
    """Whatever renders templates."""

    def render(self, template: str, variables: Mapping[str, Any]) -> str:
        """See `templates.render`."""


class TemplateProcess:
    """Renders in a process of its own, one rendering at a time; threads may share it."""

    def __init__(self, max_seconds: float = MAX_SECONDS) -> None:
        self.max_seconds = max_seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._end: weakref.finalize[Any, Any] | None = None
        self._lock = threading.Lock()

    @property
    def pid(self) -> int | None:
        """Of the process that runs now."""
        return self._process.pid if self._process else None

    def start(self) -> None:
        """Have the process ready before somebody waits for it."""
        with self._lock:
            self._running()

    def render(self, template: str, variables: Mapping[str, Any]) -> str:
        """What `templates.render` gives or raises. UnsupportedModel where it takes too long or too much."""
        request = msgspec.msgpack.encode(Request(template, dict(variables)))
        with self._lock:
            answer = self._ask(request)
        if answer.error is None:
            return answer.text
        raised = getattr(errors, answer.error)
        raise raised(answer.text, answer.param)

    def close(self) -> None:
        """End the process; the next rendering starts another."""
        with self._lock:
            self._kill()

    def _ask(self, request: bytes) -> Answer:
        process = self._running()
        try:
            assert process.stdin is not None
            _write(process.stdin, request)
            return msgspec.msgpack.decode(self._read_answer(process), type=Answer)
        except TimeoutError:
            self._kill()
            raise UnsupportedModel(
                f"the model's chat template takes longer than {self.max_seconds:g} s for this conversation"
            ) from None
        except (OSError, EOFError, msgspec.MsgspecError):
            self._kill()
            raise UnsupportedModel("the model's chat template takes too much memory or processor time") from None
        except BaseException:  # an interrupt in between would leave an answer for the next request
            self._kill()
            raise

    def _read_answer(self, process: subprocess.Popen[bytes]) -> bytes:
        assert process.stdout is not None
        deadline = time.monotonic() + self.max_seconds
        length = int.from_bytes(_read_until(process.stdout, LENGTH_BYTES, deadline), "big")
        if length > MAX_ANSWER:
            raise EOFError
        return _read_until(process.stdout, length, deadline)

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        self._kill()
        # It sees no environment variable of ours, and Ctrl-C is its starter's.
        self._process = subprocess.Popen(
            [sys.executable, "-m", __spec__.name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env={"PYTHONPATH": ":".join(sys.path)},
            process_group=0,
        )
        self._end = weakref.finalize(self, _end, self._process)
        assert self._process.stdout is not None
        try:  # an empty answer says that it is up
            _read_until(self._process.stdout, LENGTH_BYTES, time.monotonic() + START_SECONDS)
        except (TimeoutError, EOFError):
            self._kill()
            raise Unavailable("the process that renders chat templates does not start; try again") from None
        return self._process

    def _kill(self) -> None:
        if self._end is not None:
            self._end()
        self._process = self._end = None


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        pipe.close()


def _write(pipe: IO[bytes], body: bytes) -> None:
    unsent = memoryview(len(body).to_bytes(LENGTH_BYTES, "big") + body)
    while unsent:
        unsent = unsent[pipe.write(unsent) :]


def _read_until(pipe: IO[bytes], length: int, deadline: float) -> bytes:
    """So many bytes; TimeoutError when they do not come in time, EOFError when they never will."""
    poll = select.poll()
    poll.register(pipe, select.POLLIN)
    read = bytearray()
    while len(read) < length:
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            raise TimeoutError
        part = pipe.read(length - len(read))
        if not part:
            raise EOFError
        read += part
    return bytes(read)


def main() -> None:
    """Render what comes, until nothing more can come."""
    _limit()
    requests = sys.stdin.buffer
    with open(sys.stdout.fileno(), "wb", buffering=0, closefd=False) as answers:
        _write(answers, b"")
        while header := requests.read(LENGTH_BYTES):
            request = msgspec.msgpack.decode(requests.read(int.from_bytes(header, "big")), type=Request)
            _renew_cpu_seconds()
            _write(answers, msgspec.msgpack.encode(_answer_to(request)))


def _answer_to(request: Request) -> Answer:
    try:
        return Answer(render(request.template, request.variables))
    except InvalidInput as error:
        return Answer(str(error), type(error).__name__, error.param)


def _limit() -> None:
    if sys.platform == "linux":  # elsewhere only time bounds the memory
        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    for limit in (resource.RLIMIT_CORE, resource.RLIMIT_FSIZE):
        resource.setrlimit(limit, (0, 0))  # it writes no file


def _renew_cpu_seconds() -> None:
    """Few seconds for the next rendering: the kernel ends one that nobody is left to kill."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    used = int(usage.ru_utime + usage.ru_stime)
    resource.setrlimit(resource.RLIMIT_CPU, (used + int(MAX_SECONDS) + 1, resource.RLIM_INFINITY))


if __name__ == "__main__":
    main()
