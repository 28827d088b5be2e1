"""Following runs: what is new comes once, to everybody, from the right place; the ledger's part of a run's state."""

import asyncio
import json
import shutil
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import msgspec
import pytest

from families import random_state
from scripted import Scripted, words
from smelt.configs import RUN_LOG, RUN_METRICS, DecoderConfig
from smelt.control import run_changes
from smelt.control.run_changes import RunChange, RunFollowers
from smelt.control.run_folders import Entry, register, write_entry
from smelt.control.run_metrics import note
from smelt.control.run_requests import RunRequests
from smelt.control.uploads import Uploads
from smelt.data.preparation import Maker, prepare
from smelt.errors import ConfigError, InUse, InvalidInput, NotFound, StorageError
from smelt.models.weights import write_model
from smelt.run_configs import TrainConfig
from smelt.settings import Settings, load_settings
from smelt.storage.database import open_database, sqlite_url
from smelt.storage.futures import Ledger
from smelt.storage.writer import Writer
from smelt.transport.messages import Failure, TrainRequest

pytestmark = pytest.mark.anyio
TINY = DecoderConfig(vocab_size=257, block_size=16, n_layer=1, n_head=2, n_embd=8)
PYDOC = {"data_path": "builtin:pydoc", "max_iters": 100}


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return load_settings(home=tmp_path / "home")


@pytest.fixture
def uploads(settings: Settings, tmp_path: Path) -> Iterator[Uploads]:
    engine = open_database(sqlite_url(tmp_path / "uploads.db"))
    writer = Writer(engine)
    yield Uploads(settings.home, engine, writer)
    writer.close()
    engine.dispose()


@pytest.fixture
def requests(settings: Settings, ledger: Ledger, uploads: Uploads) -> RunRequests:
    return RunRequests(settings, ledger, Scripted(words, ledger), uploads)


@pytest.fixture
def followers(requests: RunRequests) -> RunFollowers:
    return RunFollowers(requests)


@pytest.fixture
def run(settings: Settings, tmp_path: Path) -> tuple[str, Path]:
    """A run of a terminal: its id and folder."""
    out_dir = tmp_path / "out"
    out_dir.mkdir()
    return register(TrainConfig(out_dir=str(out_dir)), settings.runs).id, out_dir


def append(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(text)


def step(number: int) -> str:
    return json.dumps({"kind": "step", "step": number, "loss": 1.0 / number}) + "\n"


async def next_event(events: AsyncIterator[RunChange | None], kind: str) -> RunChange:
    """The next event of a kind, past those of the other kinds."""
    async with asyncio.timeout(10):
        async for event in events:
            if event is not None and event.kind == kind:
                return event
    raise AssertionError(f"the stream ended without {kind}")


def steps_of(event: RunChange) -> list[int]:
    return [values["step"] for values in event.data]


async def test_new_lines_come_whole_and_once_and_the_state_with_them(
    followers: RunFollowers, run: tuple[str, Path]
) -> None:
    run_id, out_dir = run
    append(out_dir / RUN_METRICS, step(1))
    async with aclosing(followers.follow(run_id)) as events:
        assert (await next_event(events, "state")).data.step == 1
        append(out_dir / RUN_METRICS, step(2) + step(3)[:10])
        assert steps_of(await next_event(events, "metrics")) == [2]
        assert (await next_event(events, "state")).data.step == 2
        append(out_dir / RUN_METRICS, step(3)[10:])
        assert steps_of(await next_event(events, "metrics")) == [3]
        append(out_dir / RUN_LOG, "step 3\n")
        assert (await next_event(events, "log")).data == ["step 3"]
        append(out_dir / RUN_METRICS, '{"kind": "failure", "message": "no power"}\n')
        state = (await next_event(events, "state")).data
        assert (state.state, state.reason) == ("failed", "no power")


async def test_who_comes_back_with_a_cursor_gets_what_was_missed_and_nothing_twice(
    followers: RunFollowers, run: tuple[str, Path]
) -> None:
    run_id, out_dir = run
    async with aclosing(followers.follow(run_id)) as events:
        await next_event(events, "state")
        append(out_dir / RUN_METRICS, step(1))
        cursor = (await next_event(events, "metrics")).cursor
    append(out_dir / RUN_METRICS, step(2) + step(3))
    append(out_dir / RUN_LOG, "two lines\nof log\n")
    async with aclosing(followers.follow(run_id, cursor=cursor)) as events:
        assert steps_of(await next_event(events, "metrics")) == [2, 3]
        assert (await next_event(events, "log")).data == ["two lines", "of log"]
        append(out_dir / RUN_METRICS, step(4))
        assert steps_of(await next_event(events, "metrics")) == [4]


async def test_the_cursors_of_curves_and_log_continue_as_a_stream(
    followers: RunFollowers, requests: RunRequests, run: tuple[str, Path]
) -> None:
    run_id, out_dir = run
    append(out_dir / RUN_METRICS, step(1))
    append(out_dir / RUN_LOG, "one\n")
    cursor = f"{requests.runs.curves(run_id).cursor}/{requests.runs.log(run_id, 10).cursor}"
    append(out_dir / RUN_METRICS, step(2))
    async with aclosing(followers.follow(run_id, cursor=cursor)) as events:
        assert steps_of(await next_event(events, "metrics")) == [2]


@pytest.mark.parametrize("cursor", ["nonsense", "0.0.0", "5.5.1/0.0.0", "0.0.0/0.0.0/0.0.0"])
async def test_a_cursor_of_something_else_voids_what_was_sent(
    followers: RunFollowers, run: tuple[str, Path], cursor: str
) -> None:
    append(run[1] / RUN_METRICS, step(1))
    async with aclosing(followers.follow(run[0], cursor=cursor)) as events:
        await next_event(events, "reset")


async def test_a_run_that_is_resumed_from_a_checkpoint_voids_what_was_sent(
    followers: RunFollowers, run: tuple[str, Path]
) -> None:
    run_id, out_dir = run
    append(out_dir / RUN_METRICS, step(1) + step(2))
    async with aclosing(followers.follow(run_id)) as events:
        await next_event(events, "state")
        (out_dir / RUN_METRICS).write_text(step(1))
        await next_event(events, "reset")
        append(out_dir / RUN_METRICS, step(2))
        assert steps_of(await next_event(events, "metrics")) == [2]


async def test_many_who_follow_one_run_share_one_tail(
    followers: RunFollowers, run: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id, out_dir = run
    tails = []
    original = run_changes.RunReader.__init__
    monkeypatch.setattr(
        run_changes.RunReader, "__init__", lambda self, *given: (tails.append(self), original(self, *given))[1]
    )
    streams = [followers.follow(run_id) for _ in range(20)]
    for stream in streams:
        await next_event(stream, "state")
    append(out_dir / RUN_METRICS, step(1))
    assert [steps_of(await next_event(stream, "metrics")) for stream in streams] == [[1]] * 20
    assert len(tails) == 1
    for stream in streams:
        await stream.aclose()
    assert followers._watch._task is not None
    async with asyncio.timeout(10):
        await followers._watch._task  # nobody is left, so nothing is watched


async def test_a_reader_that_falls_behind_is_told_to_begin_anew(
    followers: RunFollowers, run: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_changes, "MAX_WAITING", 4)
    run_id, out_dir = run
    slow, quick = followers.follow(run_id), followers.follow(run_id)
    for stream in (slow, quick):
        await next_event(stream, "state")
    for number in range(1, 6):
        append(out_dir / RUN_METRICS, step(number))
        assert steps_of(await next_event(quick, "metrics")) == [number]
        await next_event(quick, "state")
    await next_event(slow, "reset")
    for stream in (slow, quick):
        await stream.aclose()


async def test_a_removed_folder_ends_the_stream(followers: RunFollowers, run: tuple[str, Path]) -> None:
    run_id, out_dir = run
    async with aclosing(followers.follow(run_id)) as events:
        await next_event(events, "state")
        shutil.rmtree(out_dir)
        assert (await next_event(events, "removed")).data.id == run_id
        assert [event async for event in events] == []


async def test_where_reading_fails_the_streams_end_so_that_nobody_waits_in_vain(
    followers: RunFollowers, requests: RunRequests, run: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_given: Any) -> None:
        raise StorageError("the disk is gone")

    one, all_runs = followers.follow(run[0]), followers.follow_all()
    await next_event(one, "state")
    await next_event(all_runs, "runs")
    monkeypatch.setattr(requests, "status", fail)
    monkeypatch.setattr(requests, "all", fail)
    async with asyncio.timeout(10):
        assert [event async for event in one] == []
        assert [event async for event in all_runs] == []
    monkeypatch.undo()
    async with aclosing(followers.follow(run[0])) as events:
        await next_event(events, "state")


async def test_silence_is_told_too(
    followers: RunFollowers, run: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_changes, "SILENCE_S", 0.05)
    async with aclosing(followers.follow(run[0])) as events:
        await next_event(events, "state")
        assert await anext(events) is None


async def test_the_list_tells_of_new_changed_and_removed_runs_of_the_owner(
    followers: RunFollowers, settings: Settings, run: tuple[str, Path], tmp_path: Path
) -> None:
    run_id, out_dir = run
    async with aclosing(followers.follow_all("local")) as events, aclosing(followers.follow_all("eve")) as others:
        assert [status.id for status in (await next_event(events, "runs")).data] == [run_id]
        assert (await next_event(others, "runs")).data == []
        append(out_dir / RUN_METRICS, step(7))
        assert [(status.id, status.step) for status in (await next_event(events, "runs")).data] == [(run_id, 7)]
        second = register(TrainConfig(out_dir=str(tmp_path / "second")), settings.runs)
        assert [status.id for status in (await next_event(events, "runs")).data] == [second.id]
        shutil.rmtree(out_dir)
        assert (await next_event(events, "removed")).data.id == run_id
        (tmp_path / "evil").mkdir()
        entry = Entry(id="run-00000000000e", owner="eve", recipe="pretrain", config={}, created=1.0, started=1.0)
        write_entry(entry, tmp_path / "evil", settings.runs)
        assert [status.id for status in (await next_event(others, "runs")).data] == [entry.id]


async def test_a_run_that_is_asked_for_waits_in_the_ledger_for_a_launcher(
    requests: RunRequests, ledger: Ledger, settings: Settings
) -> None:
    created = await requests.create(PYDOC, "ada")
    assert (created.state, created.owner) == ("queued", "ada")
    (granted,) = await ledger.next_grants(await ledger.open_epoch(), 10, ("train",))
    asked = msgspec.msgpack.decode(granted.request, type=TrainRequest)
    assert (granted.kind, granted.owner, asked.run_id) == ("train", "ada", created.id)
    assert TrainConfig(**asked.config).out_dir == str(settings.runs / created.id)
    assert (await requests.status(created.id)).state == "queued"


async def test_what_the_ledger_knows_of_a_run_is_part_of_its_state(
    requests: RunRequests, ledger: Ledger, settings: Settings
) -> None:
    created = await requests.create(PYDOC, "ada")
    epoch = await ledger.open_epoch()
    (granted,) = await ledger.next_grants(epoch, 1, ("train",))
    register(TrainConfig(**created.config), settings.runs)
    waiting = await requests.status(created.id)
    assert waiting.state == "queued"
    assert "checkpoint" in waiting.reason
    await ledger.finish(granted.id, epoch, msgspec.msgpack.encode(Failure("DataError", "no text in it")), "user")
    failed = await requests.show(created.id)
    assert (failed.state, failed.reason) == ("failed", "no text in it")


async def test_a_queued_run_is_cancelled_and_one_of_a_terminal_is_left_alone(
    requests: RunRequests, run: tuple[str, Path]
) -> None:
    created = await requests.create(PYDOC, "ada")
    with pytest.raises(NotFound):
        await requests.cancel(created.id, "eve")
    assert (await requests.cancel(created.id, "ada")).state == "cancelled"
    assert (await requests.cancel(created.id)).state == "cancelled"
    with pytest.raises(InvalidInput, match="Ctrl-C"):
        await requests.cancel(run[0])


async def test_a_run_that_was_stopped_is_resumed_under_its_id(
    requests: RunRequests, ledger: Ledger, settings: Settings
) -> None:
    created = await requests.create(PYDOC, "ada")
    with pytest.raises(InUse, match="queued already"):
        await requests.resume(created.id, "ada")
    epoch = await ledger.open_epoch()
    (granted,) = await ledger.next_grants(epoch, 1, ("train",))
    register(TrainConfig(**created.config), settings.runs)
    append(settings.runs / created.id / RUN_METRICS, step(3))
    append(settings.runs / created.id / RUN_METRICS, '{"kind": "summary", "stop_reason": "interrupted"}\n')
    assert (await requests.cancel(created.id, "ada")).state == "cancelled"
    with pytest.raises(NotFound):
        await requests.resume(created.id, "eve")
    resumed = await requests.resume(created.id, "ada")
    assert (resumed.id, resumed.state, resumed.step, "checkpoint" in resumed.reason) == (created.id, "queued", 3, True)
    (again,) = await ledger.next_grants(epoch, 1, ("train",))
    assert (again.lane, again.seq, again.request, again.id != granted.id) == (granted.lane, 2, granted.request, True)
    failure = msgspec.msgpack.encode(Failure("NonFiniteLoss", "the loss became nan"))
    await ledger.finish(again.id, epoch, failure, "user")
    assert (await requests.status(created.id)).reason == "the loss became nan"
    assert (await requests.resume(created.id)).state == "queued"
    assert (await requests.cancel(created.id)).state == "cancelled"


async def test_a_run_that_lacks_memory_says_what_it_waits_for(
    settings: Settings, requests: RunRequests, ledger: Ledger
) -> None:
    created = await requests.create(PYDOC, "ada")
    epoch = await ledger.open_epoch()
    await ledger.next_grants(epoch, 1, ("train",))
    note(settings.runs / created.id, "waiting", "it waits for memory")
    waiting = await requests.status(created.id)
    assert (waiting.state, waiting.reason) == ("queued", "it waits for memory")
    append(settings.runs / created.id / RUN_METRICS, step(1))
    assert (await requests.status(created.id)).reason == ""


async def test_a_run_of_a_terminal_is_resumed_by_the_server_and_one_that_has_succeeded_is_not(
    requests: RunRequests, ledger: Ledger, run: tuple[str, Path]
) -> None:
    run_id, out_dir = run
    assert (await requests.resume(run_id)).state == "queued"
    (granted,) = await ledger.next_grants(await ledger.open_epoch(), 1, ("train",))
    asked = msgspec.msgpack.decode(granted.request, type=TrainRequest)
    assert (asked.run_id, asked.config["out_dir"], granted.owner) == (run_id, str(out_dir), "local")
    await requests.cancel(run_id)
    append(out_dir / RUN_METRICS, '{"kind": "summary", "stop_reason": "done"}\n')
    with pytest.raises(InvalidInput, match="has succeeded"):
        await requests.resume(run_id)


async def test_a_run_of_another_recipe_reads_its_senders_uploads(
    requests: RunRequests, settings: Settings, uploads: Uploads
) -> None:
    write_model(TINY, random_state(TINY), settings.models / "tiny")
    async with uploads.incoming() as incoming:
        await incoming.write(b'{"text": "hello"}\n')
        upload = await uploads.keep(incoming, "ada", "lines.jsonl", "fine-tune")
    wanted = {"recipe": "fine-tune", "model": "tiny", "data": upload.id}
    created = await requests.create(wanted, "ada")
    place = settings.runs / created.id / "data.jsonl"
    assert (created.recipe, created.config["model"], created.config["data"]) == ("fine-tune", "tiny", str(place))
    await uploads.delete("ada", upload.id)
    assert place.read_bytes() == b'{"text": "hello"}\n'
    for changes, error, word in (
        ({"data": upload.id}, NotFound, "no file"),
        ({"data": "/etc/passwd"}, InvalidInput, "not a name"),
        ({"data": "unknown"}, NotFound, "unknown"),
        ({"model": str(settings.models / "tiny")}, NotFound, "no registered model"),
        ({"init_from": "resume"}, InvalidInput, "resume"),
        ({"recipe": "classify", "model": "scratch", "data": "/etc/passwd"}, InvalidInput, "no upload"),
        ({"recipe": "classify", "model": "scratch", "tokenizer": "/etc", "data": "x"}, InvalidInput, "tokenizer"),
    ):
        with pytest.raises(error, match=word):
            await requests.create({**wanted, **changes}, "ada")


async def test_nobody_trains_on_the_dataset_of_another(requests: RunRequests, settings: Settings) -> None:
    ada = Maker("ada")
    prepare("builtin:pydoc", settings.datasets, "hers", tokenizer="bytes", maker=ada)
    assert (await requests.create({"dataset": "hers"}, "ada")).state == "queued"
    with pytest.raises(NotFound, match="no dataset 'hers'"):
        await requests.create({"dataset": "hers"}, "eve")


async def test_a_run_whose_server_died_before_it_was_accepted_is_lost(
    requests: RunRequests, settings: Settings
) -> None:
    entry = Entry(id="run-00000000000a", owner="ada", recipe="pretrain", config={}, created=1.0, future_id="unknown")
    write_entry(entry, settings.runs / entry.id, settings.runs)
    status = await requests.status(entry.id)
    assert (status.state, "before it accepted" in status.reason) == ("failed", True)


@pytest.mark.parametrize(
    ("values", "error", "word"),
    [
        ({"data_path": "/etc/passwd"}, InvalidInput, "built in"),
        ({"data_path": "https://example.org/text"}, InvalidInput, "built in"),
        ({"data_path": "hf:org/name"}, InvalidInput, "built in"),
        ({"dataset": "../../etc"}, InvalidInput, "not a name"),
        ({"dataset": "unknown"}, NotFound, "unknown"),
        ({}, InvalidInput, "no data"),
        ({**PYDOC, "tokenizer": "/tmp"}, InvalidInput, "tokenizer"),
        ({**PYDOC, "init_from": "/tmp"}, NotFound, "init_from"),
        ({**PYDOC, "init_from": "resume"}, NotFound, "init_from"),
        ({**PYDOC, "out_dir": "/tmp/x"}, InvalidInput, "out_dir"),
        ({**PYDOC, "ranks": 10_000}, InvalidInput, "cores"),
        ({"recipe": "classify", "data": "file-1", "threads": 10_000}, InvalidInput, "cores"),
        ({**PYDOC, "wandb": True}, InvalidInput, "wandb"),
        ({**PYDOC, "max_itres": 3}, ConfigError, "max_itres"),
    ],
)
async def test_a_request_names_only_what_the_server_has_and_a_refused_one_leaves_nothing(
    requests: RunRequests, values: dict[str, Any], error: type[Exception], word: str
) -> None:
    with pytest.raises(error, match=word):
        await requests.create(values, "ada")
    assert await requests.all() == []
