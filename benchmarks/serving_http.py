"""Servers under load, for `serving.py`: starts them, and asks them as many clients at once would; knows no tables."""

import asyncio
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import openai

START_SECONDS = 120
Command = Callable[[Path, int], list[str]]


def smelt_command(quantize: str) -> Command:
    """`smelt serve` of a model folder, on a port."""
    return lambda folder, port: [
        *(sys.executable, "-m", "smelt", "serve", str(folder)),
        *("--port", str(port), "--quantize", quantize),
    ]


def transformers_command(folder: Path, port: int) -> list[str]:
    """`transformers serve`, as its help has it for a single model."""
    program = str(Path(sys.executable).with_name("transformers"))
    return [program, "serve", str(folder), "--port", str(port), "--device", "cpu", "--dtype", "bfloat16"]


SERVERS: dict[str, Command] = {
    "smelt serve": smelt_command("none"),
    "smelt serve --quantize int8": smelt_command("int8"),
    "transformers serve": transformers_command,
}


@dataclass
class Load:
    """What the clients of a server saw, over all rounds."""

    num_tokens: int = 0
    seconds: float = 0.0
    first_tokens: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)  # between two pieces of an answer

    @property
    def rate(self) -> float:
        """Output tokens per second of all clients together."""
        return self.num_tokens / self.seconds


@contextmanager
def running(name: str, folder: Path, home: Path, num_threads: int) -> Iterator[str]:
    """The address of a server that is ready to answer; it is ended afterwards."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = {"SMELT_HOME": str(home), "SMELT_THREADS": str(num_threads), "SMELT_DTYPE": "bfloat16"}
    environment = os.environ | settings | {"OMP_NUM_THREADS": str(num_threads)}
    with (home / f"{name}.log").open("w") as log:
        process = subprocess.Popen(SERVERS[name](folder, port), env=environment, stdout=log, stderr=log)
        try:
            address = f"http://127.0.0.1:{port}/v1"
            asyncio.run(wait_until_it_answers(address, folder, process))
            yield address
        finally:
            process.terminate()
            process.wait(START_SECONDS)


async def wait_until_it_answers(address: str, folder: Path, process: subprocess.Popen[bytes]) -> None:
    """Ask for one token until it comes. SystemExit where the server ends, or takes too long."""
    deadline = time.monotonic() + START_SECONDS
    async with openai.AsyncOpenAI(base_url=address, api_key="none", max_retries=0) as client:
        while process.poll() is None and time.monotonic() < deadline:
            try:
                await client.completions.create(model=str(folder), prompt="w1", max_tokens=1)
            except openai.APIError:
                await asyncio.sleep(0.2)
            else:
                return
    raise SystemExit(f"{process.args} does not answer")


async def ask(address: str, model: str, prompts: list[str], num_clients: int, num_new: int, load: Load) -> None:
    """Let so many clients ask for all the prompts, one after the other each, and add what they saw to `load`."""
    waiting = iter(prompts)
    async with openai.AsyncOpenAI(base_url=address, api_key="none", max_retries=0, timeout=600) as client:

        async def ask_on() -> None:
            for prompt in waiting:
                await ask_once(client, model, prompt, num_new, load)

        start = time.perf_counter()
        await asyncio.gather(*(ask_on() for _ in range(num_clients)))
        load.seconds += time.perf_counter() - start
    load.num_tokens += num_new * len(prompts)


async def ask_once(client: openai.AsyncOpenAI, model: str, prompt: str, num_new: int, load: Load) -> None:
    """One streamed answer, which must have as many tokens as were asked for."""
    start, times, reason = time.perf_counter(), [], None
    stream = await client.completions.create(model=model, prompt=prompt, max_tokens=num_new, temperature=0, stream=True)
    async for chunk in stream:
        if chunk.choices and chunk.choices[0].text:
            times.append(time.perf_counter())
        reason = chunk.choices[0].finish_reason or reason if chunk.choices else reason
    if reason != "length" or not times:
        raise SystemExit(f"an answer ended early: {reason}")
    load.first_tokens.append(times[0] - start)
    load.gaps += [later - earlier for earlier, later in pairwise(times)]
