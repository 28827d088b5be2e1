"""The end of the demo: a server with the new model, asked by OpenAI's own client; knows no training.

The server is a process of its own, the one that `smelt serve` is. Its log goes to a file, so that the terminal shows
what the model writes.
"""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from smelt.errors import ConfigError, SmeltError
from smelt.settings import Settings

HOST = "127.0.0.1"
LOG_FILE = "demo-server.log"
MAX_TOKENS = 120


class DemoServer:
    """A server that has said where it is."""

    def __init__(self, process: "subprocess.Popen[str]", url: str, log: Path) -> None:
        self.process = process
        self.url = url
        self.log = log

    def write(self, model: str, prompt: str, seed: int) -> None:
        """Stream one answer to the terminal."""
        import openai

        client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none")
        try:
            pieces = client.completions.create(
                model=model, prompt=prompt, max_tokens=MAX_TOKENS, temperature=0.5, top_p=0.9, seed=seed, stream=True
            )
        except openai.AuthenticationError:
            raise ConfigError(
                "this home folder has API keys, so its server asks the demo for one; run the demo in another: "
                "SMELT_HOME=~/smelt-demo smelt demo"
            ) from None
        for piece in pieces:
            click.echo(piece.choices[0].text if piece.choices else "", nl=False)
        click.echo()

    def stay(self) -> None:
        """Return when Ctrl-C has ended the server, after what it still answers, or at once by a second one."""
        try:
            self.process.wait()
        except KeyboardInterrupt:
            click.echo("\nstopping", err=True)
            self.end()
        if self.process.returncode != 0:
            raise SmeltError(f"the server ended by itself: {last_line(self.log)} (all of it: {self.log})")

    def end(self) -> None:
        """Let it finish what it is doing, and end."""
        self.process.terminate()
        try:
            self.process.wait()
        except KeyboardInterrupt:
            self.process.terminate()
            self.process.wait()


@contextmanager
def demo_server(model: Path, settings: Settings) -> Iterator[DemoServer]:
    """A server with that model while the block runs. SmeltError with its last words where it cannot start."""
    from smelt.cluster.lifeline import start_command

    port = str(free_port(settings.port))
    lifeline, held = os.pipe()
    log = settings.home / LOG_FILE
    with log.open("wb") as file:
        command = start_command(lifeline, "smelt", "serve", str(model), "--host", HOST, "--port", port)
        # A group of its own: Ctrl-C is ours, and the server hears of it from us.
        process = subprocess.Popen(
            command, pass_fds=[lifeline], stdout=subprocess.PIPE, stderr=file, text=True, process_group=0
        )
    with process:
        try:
            server = DemoServer(process, url_of(process, log), log)
            yield server
            server.end()
        finally:
            os.close(held)
            os.close(lifeline)


def free_port(wanted: int) -> int:
    """The port that is wanted, or 0, which takes any, where somebody has it."""
    from smelt.cluster.claims import is_taken

    if not is_taken(HOST, wanted):
        return wanted
    click.echo(f"port {wanted} is taken; taking another one", err=True)
    return 0


def url_of(process: "subprocess.Popen[str]", log: Path) -> str:
    """Where it serves, as soon as it says so. SmeltError where it ends instead."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("OpenAI: "):
            return line.split()[1].removesuffix("/v1")
    process.wait()
    raise SmeltError(f"the server did not start: {last_line(log)} (all of it: {log})")


def last_line(log: Path) -> str:
    """What somebody said last."""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else "it said nothing"
