"""Pages in Chromium for tests: a server of scripted answers on a real port, runs moved by hand, a page under watch."""

import asyncio
import fcntl
import json
import shutil
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from pathlib import Path
from typing import Any, TextIO
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, sync_playwright

from live import serving
from scripted import Scripted, scripted
from smelt.api.app import create_app
from smelt.api.services import Services
from smelt.configs import RUN_LOCK, RUN_LOG, RUN_METRICS
from smelt.control.model_server import WorkerInfo
from smelt.control.run_folders import register
from smelt.errors import SmeltError
from smelt.run_configs import TrainConfig
from smelt.transport.messages import Finish, Generate

# It shall do nothing of its own accord, least of all call home.
FLAGS = [
    "--no-sandbox",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
DESKTOP: dict[str, Any] = {"viewport": {"width": 1280, "height": 800}}
PHONE: dict[str, Any] = {"viewport": {"width": 360, "height": 740}, "is_mobile": True, "has_touch": True}
LIVE_MS = 2000  # what happens in a run is on the page within this time


class Author:
    """Writes numbered words with marks that must stay text, or fails when told to."""

    def __init__(self) -> None:
        self.num_words = 5
        self.problem: SmeltError | None = None

    async def write(self, _request: Generate) -> AsyncGenerator[str | Finish, None]:
        if self.problem is not None:
            raise self.problem
        for number in range(self.num_words):
            yield f" word{number}." if number % 2 else f" <b>word{number}</b>"
            await asyncio.sleep(0.02)


class Site:
    """The pages on a real port, with runs that a test moves on line by line."""

    def __init__(self, folder: Path, services: Services, models: Scripted, author: Author) -> None:
        self.folder = folder
        self.services = services
        self.models = models
        self.author = author
        self.url = ""
        self.locks: list[TextIO] = []

    def start_run(self, name: str) -> "LiveRun":
        out_dir = self.folder / name
        out_dir.mkdir()
        config = TrainConfig(out_dir=str(out_dir), max_iters=200)
        entry = register(config, self.services.settings.runs)
        lock = (out_dir / RUN_LOCK).open("w")
        fcntl.flock(lock, fcntl.LOCK_EX)
        self.locks.append(lock)
        return LiveRun(entry.id, out_dir, lock)


class LiveRun:
    """A run that a test trains by hand."""

    def __init__(self, run_id: str, out_dir: Path, lock: TextIO) -> None:
        self.id = run_id
        self.out_dir = out_dir
        self.lock = lock
        self.num_steps = 0

    def train(self, num_steps: int = 1) -> None:
        for _ in range(num_steps):
            self.num_steps += 1
            values = {"kind": "step", "step": self.num_steps, "loss": 4 / self.num_steps, "seconds": 0.5}
            self.write({**values, "learning_rate": 1e-3, "grad_norm": 1.0, "tokens_per_second": 1234.0})
            with (self.out_dir / RUN_LOG).open("a") as file:
                file.write(f"step {self.num_steps} is done\n")

    def evaluate(self, val_loss: float) -> None:
        self.write({"kind": "evaluation", "step": self.num_steps, "val_loss": val_loss, "final": False})

    def write(self, values: dict[str, Any]) -> None:
        with (self.out_dir / RUN_METRICS).open("a") as file:
            file.write(json.dumps(values) + "\n")

    def end(self, values: dict[str, Any]) -> None:
        self.write(values)
        self.lock.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("Chromium is absent: install the system's package chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    author = Author()
    with scripted(tmp_path / "home", author.write) as (services, models):
        models.workers = [WorkerInfo("here:1", 1, "cpu", ("tiny",), 0, 0)]
        site = Site(tmp_path, services, models, author)
        with serving(create_app(services), lifespan="on") as site.url:  # which does imports
            yield site
        for lock in site.locks:
            lock.close()


class Visit:
    """A page under watch: it must not complain, and must not ask any other host.

    A browser says of each refused request that it was refused, at a moment of its own choosing: a test that
    has requests refused names their statuses before it opens the page.
    """

    def __init__(self, page: Page, url: str) -> None:
        self.page = page
        self.url = url
        self.complaints: list[str] = []
        self.refusals: tuple[int, ...] = ()
        self.hosts: set[str] = set()
        page.on("console", self.note_word)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("request", lambda request: self.hosts.add(urlsplit(request.url).netloc))
        page.on("requestfailed", self.note_failure)

    def note_word(self, message: ConsoleMessage) -> None:
        is_expected = any(f"status of {status}" in message.text for status in self.refusals)
        if message.type in ("error", "warning") and not is_expected:
            self.complaints.append(message.text)

    def note_failure(self, request: Any) -> None:
        if request.failure != "net::ERR_ABORTED":  # what the page itself gave up: a stream when it is left
            self.complaints.append(f"{request.url}: {request.failure}")

    def open(self, path: str) -> Page:
        self.page.goto(self.url + path)
        return self.page

    def check(self) -> None:
        assert self.complaints == []
        assert self.hosts <= {urlsplit(self.url).netloc}


@pytest.fixture
def visit(browser: Browser, site: Site, request: pytest.FixtureRequest) -> Iterator[Visit]:
    context = browser.new_context(**getattr(request, "param", DESKTOP))
    context.set_default_timeout(15_000)
    visit = Visit(context.new_page(), site.url)
    yield visit
    context.close()
    visit.check()


def wait_until(page: Page, is_so: Callable[[], bool], limit_ms: int = 15_000) -> None:
    """Wait for what the page's own functions for waiting cannot see, or may not: its policy forbids them to eval."""
    end = time.monotonic() + limit_ms / 1000
    while not is_so():
        assert time.monotonic() < end
        page.wait_for_timeout(20)


def wait_for_chart(page: Page, condition: str, limit_ms: int = 15_000) -> None:
    """Wait until something holds of the loss chart's curves: train, train smoothed, validation."""
    expression = f"Boolean(document.getElementById('loss-chart').data?.{condition})"
    wait_until(page, lambda: bool(page.evaluate(expression)), limit_ms)
