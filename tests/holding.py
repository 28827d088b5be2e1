"""A server with two tiny models, whose one worker holds what it is told to and writes nothing."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from families import random_state
from gated import services_in
from smelt.api.services import Services
from smelt.configs import DecoderConfig
from smelt.control.model_server import WorkerInfo
from smelt.control.models import import_model
from smelt.data.characters import ByteTokenizer
from smelt.errors import Unavailable
from smelt.models.weights import write_model

CONFIG = DecoderConfig(vocab_size=257, block_size=16, n_layer=1, n_head=2, n_embd=8)


class Holding:
    """A model server that loads and unloads; without its worker nobody is there."""

    def __init__(self) -> None:
        self.held: list[str] = []
        self.is_there = True

    @property
    def workers(self) -> list[WorkerInfo]:
        return [WorkerInfo("here:1", 1, "cpu", tuple(self.held), 0, 0)] if self.is_there else []

    async def load_model(self, model: str) -> None:
        if not self.is_there:
            raise Unavailable("no worker is connected")
        self.held.append(model)

    async def unload_model(self, model: str) -> int:
        if not self.is_there:
            raise Unavailable("no worker is connected")
        num = self.held.count(model)
        self.held = [held for held in self.held if held != model]
        return num


def write_source(folder: Path) -> Path:
    """A model folder to import."""
    write_model(CONFIG, random_state(CONFIG), folder)
    ByteTokenizer().save(folder)
    return folder


@contextmanager
def holding_server(home: Path, default_model: str | None = None) -> Iterator[tuple[Services, Holding]]:
    """(services, their model server) with the registered models `one` and `two`."""
    source = write_source(home.with_name("source"))
    for name in ("one", "two"):
        import_model(source, name, home / "models", origin="x")
    with services_in(home) as services:
        holding = Holding()
        yield replace(services, model_server=holding, default_model=default_model), holding
