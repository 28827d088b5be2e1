"""Child processes: how one is started, what it said last, how long until the next start; knows no program's work."""

import asyncio
import os
import signal
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

from smelt.cluster.lifeline import start_command

TAIL_BYTES = 2000
# Seconds before the next start, by the number of deaths within the last minute: the first few are bad luck.
PAUSES = (0.0, 0.1, 0.1, 0.1, 0.2, 0.5, 1.0, 2.0, 4.0, 7.0, 10.0)
MEMORY_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Program:
    """What to start: a module with its arguments and the descriptors that it inherits."""

    name: str
    module: str
    arguments: tuple[str, ...] = ()
    descriptors: tuple[int, ...] = ()


class Child:
    """One life of a program, in a process group of its own: Ctrl-C reaches its starter alone."""

    def __init__(self, program: Program, process: asyncio.subprocess.Process, held: int, output: int) -> None:
        self.name = program.name
        self.pid = process.pid
        self._process = process
        self._held = held
        self._output = output
        self._said = b""
        asyncio.get_running_loop().add_reader(output, self._pass_on)

    async def wait(self) -> int:
        """Its exit code, or minus the signal that ended it. Whatever it had started is ended then too."""
        code = await self._process.wait()
        self.kill()
        os.close(self._held)
        return code

    def terminate(self) -> None:
        """Ask the program to end; it tells its own children."""
        with suppress(ProcessLookupError):
            self._process.terminate()

    def kill(self) -> None:
        """End every process of its group."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    @property
    def last_words(self) -> str:
        """The end of what it said."""
        return self._said.decode(errors="replace").strip()

    def _pass_on(self) -> None:
        said = os.read(self._output, 65536)
        if not said:
            asyncio.get_running_loop().remove_reader(self._output)
            os.close(self._output)
            return
        self._said = (self._said + said)[-TAIL_BYTES:]
        with suppress(OSError):  # nobody reads our own output any more; the programs go on
            sys.stderr.buffer.write(said)
            sys.stderr.buffer.flush()


async def start(program: Program, environment: Mapping[str, str]) -> Child:
    """Start a program that dies with this process: nobody else holds the other end of its lifeline."""
    lifeline, held = os.pipe()
    # A pipe of our own for what it says: asyncio's would have us wait for whatever else has inherited it.
    reading, writing = os.pipe()
    try:
        process = await asyncio.create_subprocess_exec(
            *start_command(lifeline, program.module, *program.arguments),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=writing,
            stderr=writing,
            env=environment,
            pass_fds=(lifeline, *program.descriptors),
            process_group=0,
        )
    except OSError:
        os.close(held)
        os.close(reading)
        raise
    finally:
        os.close(lifeline)
        os.close(writing)
    return Child(program, process, held, reading)


class Deaths:
    """When a program died, and what follows from it."""

    def __init__(self) -> None:
        self._times: list[float] = []

    def note(self, now: float) -> int:
        """One more death; returns how many there were within the last minute."""
        self._times = [*(time for time in self._times if now - time < MEMORY_SECONDS), now]
        return len(self._times)

    @property
    def pause(self) -> float:
        """Seconds to wait before the next start."""
        return PAUSES[min(len(self._times), len(PAUSES) - 1)]


def manner_of_death(code: int) -> str:
    """An exit code in words."""
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"
