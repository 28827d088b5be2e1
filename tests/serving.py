"""A tiny model to serve, and `smelt serve` as the process that somebody would start."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from families import random_state
from processes import children_of, eventually
from smelt.configs import DecoderConfig
from smelt.data.characters import ByteTokenizer
from smelt.models.loading import write_model

# Without a token for the end of the text, so that an answer ends where it was asked to.
CONFIG = DecoderConfig(vocab_size=256, block_size=64, n_layer=1, n_head=2, n_embd=16)

# role -> what its command has and no other's.
ROLES = {"api": "smelt.api.server", "launcher": "smelt.cluster.launcher", "worker": " smelt worker "}


def write_tiny_model(folder: Path, vocab_size: int = CONFIG.vocab_size) -> Path:
    """A model folder with random weights, whose tokens are bytes; 128 of them are characters of ASCII."""
    folder.mkdir(parents=True)
    config = CONFIG.model_copy(update={"vocab_size": vocab_size})
    write_model(config, random_state(config), folder)
    ByteTokenizer().save(folder)
    return folder


class Server:
    """A running `smelt serve`. Its log goes to a file."""

    def __init__(self, home: Path, *arguments: str) -> None:
        self.home = home
        self.log = home.with_name(f"{home.name}.log")
        _share_kernels(home)
        command = [sys.executable, "-m", "smelt", "serve", "--port", "0", *arguments]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, env=environment(home), stdout=subprocess.PIPE, stderr=log, text=True, process_group=0
            )

    def wait_until_ready(self) -> "Server":
        """Return when it has said where it is."""
        assert self.process.stdout is not None
        lines = [self.process.stdout.readline() for _ in range(3)]
        assert lines[0].startswith("page: "), self.log.read_text()
        self.url = lines[0].split()[1].removesuffix("/dashboard")
        return self

    def pid_of(self, role: str) -> int:
        """The process with that role, as soon as there is one."""

        def look() -> int | None:
            children = children_of(self.process.pid)
            return next((pid for pid, command in children.items() if ROLES[role] in f"{command} "), None)

        found = eventually(look, f"the start of the {role}")
        assert found is not None
        return found

    def end(self) -> int:
        """Its exit code, after SIGTERM."""
        self.process.terminate()
        self.process.communicate(timeout=50)
        return self.process.returncode


def environment(home: Path) -> dict[str, str]:
    """For a process that works in that home folder, with one thread."""
    return {**os.environ, "SMELT_HOME": str(home), "SMELT_THREADS": "1", "SMELT_DEVICE": "cpu"}


def _share_kernels(home: Path) -> None:
    """Have them compiled once and not for each home folder, which takes a while; they are found by their content."""
    shared = Path(tempfile.gettempdir()) / f"smelt-kernels-{os.getuid()}"
    shared.mkdir(mode=0o700, exist_ok=True)
    home.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):
        (home / "kernels").symlink_to(shared)


@contextmanager
def serving(home: Path, *arguments: str) -> Iterator[Server]:
    """`smelt serve` in that home folder while the block runs."""
    server = Server(home, *arguments)
    try:
        yield server.wait_until_ready()
    finally:
        server.process.kill()
        server.process.communicate()
