"""Imports that are asked of a server: from where, done once whoever dies, given up, and how far they are."""

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from families import random_state
from smelt.configs import DecoderConfig
from smelt.control import imports as module
from smelt.control.imports import ImportJob, Imports
from smelt.control.models import import_model, list_models, set_alias, show_model
from smelt.data.characters import ByteTokenizer
from smelt.errors import AlreadyExists, InvalidInput, NotFound
from smelt.models.weights import write_model
from smelt.settings import Settings, load_settings
from smelt.storage.database import open_database
from smelt.storage.files import Files
from smelt.storage.futures import Ledger
from smelt.storage.writer import Writer

pytestmark = pytest.mark.anyio

CONFIG = DecoderConfig(vocab_size=257, block_size=16, n_layer=1, n_head=2, n_embd=8)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return load_settings(home=tmp_path / "home")


@pytest.fixture
def run(settings: Settings) -> Path:
    """A run in the home folder that has saved its best."""
    folder = settings.runs / "run-1"
    write_model(CONFIG, random_state(CONFIG), folder / "best")
    ByteTokenizer().save(folder / "best")
    return folder


class Blocked:
    """In place of copying: waits until it may go on, telling what it is told to."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.begun = threading.Event()
        self.num_done = 0

    def __call__(self, source: Path, name: str, models: Path, origin: str, progress: object, job: str) -> None:
        assert callable(progress)
        progress("copying", 1, 2)
        self.begun.set()
        assert self.go.wait(10)
        progress("copying", 2, 2)
        import_model(source, name, models, origin, job=job)
        self.num_done += 1


@pytest.fixture
def blocked(monkeypatch: pytest.MonkeyPatch) -> Iterator[Blocked]:
    blocked = Blocked()
    monkeypatch.setattr(module, "import_model", blocked)
    yield blocked
    blocked.go.set()


async def ended(imports: Imports, job: ImportJob) -> ImportJob:
    return await imports.read(job.id, wait_s=10)


async def test_a_model_of_the_home_folder_is_imported(settings: Settings, ledger: Ledger, run: Path) -> None:
    imports = Imports(settings, ledger)
    async with imports.running():
        job = await imports.create("runs/run-1", "mine")
        assert (job.source, job.name, job.error) == ("runs/run-1", "mine", None)
        done = await ended(imports, job)
        assert done.status == "completed"
    assert show_model("mine", settings.models).origin == "runs/run-1"
    assert [each.id for each in await imports.all()] == [job.id]


async def test_a_model_of_the_hub_is_imported(
    settings: Settings, ledger: Ledger, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def hub_folder(*repositories: str, progress: object) -> Path:
        asked.extend(repositories)
        return run / "best"

    monkeypatch.setattr(module, "hub_folder", hub_folder)
    imports = Imports(settings, ledger)
    async with imports.running():
        assert (await ended(imports, await imports.create("hf:org/name", "theirs"))).status == "completed"
        assert (await ended(imports, await imports.create("gpt2", "gpt2"))).status == "completed"
    assert asked == ["org/name", "openai-community/gpt2", "gpt2"]
    assert show_model("theirs", settings.models).origin == "hf:org/name"


@pytest.mark.parametrize(
    "source",
    [
        *("", "/etc", "../elsewhere", "runs/../../elsewhere", "~/models", "~root", "http://host/x", "file:///etc"),
        *("hf:", "hf:../x", "hf:a/b/c", "hf:https://host/x", "runs/nothing", "runs", "a\0b", "link", "linked", "."),
    ],
)
async def test_a_source_is_of_the_hub_or_of_the_home_folder(
    settings: Settings, ledger: Ledger, run: Path, tmp_path: Path, source: str
) -> None:
    outside = tmp_path / "elsewhere"
    write_model(CONFIG, random_state(CONFIG), outside)
    (settings.home / "link").symlink_to(outside)
    (settings.home / "linked").mkdir()
    for name in ("config.json", "model.safetensors"):
        (settings.home / "linked" / name).symlink_to(outside / name)
    with pytest.raises((InvalidInput, NotFound)) as refusal:
        await Imports(settings, ledger).create(source, "mine")
    assert str(tmp_path) not in str(refusal.value)
    assert await Imports(settings, ledger).all() == []


async def test_a_checkpoint_that_needs_converting_names_the_command(settings: Settings, ledger: Ledger) -> None:
    (settings.home / "out").mkdir(parents=True)
    (settings.home / "out" / "ckpt.pt").write_bytes(b"")
    for source in ("out", "out/ckpt.pt"):
        with pytest.raises(InvalidInput, match="smelt models import PATH NAME"):
            await Imports(settings, ledger).create(source, "mine")


async def test_what_fails_says_why(settings: Settings, ledger: Ledger, run: Path) -> None:
    weights = run / "best" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    imports = Imports(settings, ledger)
    async with imports.running():
        job = await ended(imports, await imports.create("runs/run-1", "mine"))
    assert job.status == "failed"
    assert job.error is not None
    assert "not a readable safetensors file" in job.error
    assert job.error_type == "UnsupportedModel"


async def test_a_name_that_is_taken_or_being_given_is_refused(
    settings: Settings, ledger: Ledger, run: Path, blocked: Blocked
) -> None:
    import_model(run / "best", "one", settings.models, "x")
    set_alias("short", "one", settings.models)
    imports = Imports(settings, ledger)
    for name in ("one", "short"):
        with pytest.raises(AlreadyExists):
            await imports.create("runs/run-1", name)
    with pytest.raises(InvalidInput):
        await imports.create("runs/run-1", "../up")
    async with imports.running():
        job = await imports.create("runs/run-1", "two")
        assert (await imports.create("runs/run-1", "two")).id == job.id  # asked again: the same
        with pytest.raises(AlreadyExists, match=job.id):
            await imports.create("runs/run-1/best", "two")
        blocked.go.set()
        await ended(imports, job)


async def test_how_far_it_is_is_told(settings: Settings, ledger: Ledger, run: Path, blocked: Blocked) -> None:
    imports = Imports(settings, ledger)
    async with imports.running():
        job = await imports.create("runs/run-1", "mine")
        await asyncio.to_thread(blocked.begun.wait, 10)
        job = await imports.read(job.id)
        assert job.status == "in_progress"
        assert (job.progress.stage, job.progress.num_done, job.progress.num_total) == ("copying", 1, 2)
        blocked.go.set()
        assert (await ended(imports, job)).progress.stage == ""


async def test_one_that_is_given_up_leaves_nothing(
    settings: Settings, ledger: Ledger, run: Path, blocked: Blocked
) -> None:
    imports = Imports(settings, ledger)
    async with imports.running():
        job = await imports.create("runs/run-1", "mine")
        await asyncio.to_thread(blocked.begun.wait, 10)
        assert (await imports.cancel(job.id)).status == "cancelled"
        blocked.go.set()
        other = await imports.create("runs/run-1", "other")  # those behind it go on
        assert (await ended(imports, other)).status == "completed"
        assert (await imports.cancel(other.id)).status == "completed"
    assert [info.name for info in list_models(settings.models)] == ["other"]


async def test_other_work_of_the_ledger_is_no_import(settings: Settings, ledger: Ledger) -> None:
    with pytest.raises(NotFound):
        await Imports(settings, ledger).read("nothing")


def new_process(settings: Settings) -> tuple[Ledger, Writer]:
    engine = open_database(settings.database_url)
    writer = Writer(engine)
    return Ledger(engine, writer, Files(settings.bodies)), writer


async def test_an_import_that_its_process_did_not_end_begins_again(
    settings: Settings, run: Path, blocked: Blocked
) -> None:
    first, first_writer = new_process(settings)
    imports = Imports(settings, first)
    async with imports.running():
        job = await imports.create("runs/run-1", "mine")
        await asyncio.to_thread(blocked.begun.wait, 10)
    first_writer.close()
    second, second_writer = new_process(settings)
    blocked.go.set()
    imports = Imports(settings, second)
    async with imports.running():
        assert (await ended(imports, job)).status == "completed"
    second_writer.close()


async def test_a_model_that_was_made_just_before_the_end_is_not_made_again(
    settings: Settings, ledger: Ledger, run: Path, blocked: Blocked
) -> None:
    imports = Imports(settings, ledger)
    job = await imports.create("runs/run-1", "mine")
    import_model(run / "best", "mine", settings.models, "runs/run-1", job=job.id)  # and then the process died
    async with imports.running():
        assert (await ended(imports, job)).status == "completed"
    assert blocked.num_done == 0


async def test_a_bug_fails_its_import_and_no_other(
    settings: Settings, ledger: Ledger, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_down(*_arguments: object) -> None:
        raise RuntimeError("a bug")

    imports = Imports(settings, ledger)
    async with imports.running():
        with monkeypatch.context() as patch:
            patch.setattr(module, "import_model", break_down)
            job = await ended(imports, await imports.create("runs/run-1", "mine"))
        assert job.status == "failed"
        assert job.error is not None
        assert "the log says more" in job.error
        assert (await ended(imports, await imports.create("runs/run-1", "mine"))).status == "completed"
