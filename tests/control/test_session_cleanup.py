"""What sessions leave behind goes in time, and not before; what has a name stays."""

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from gated import services_in
from smelt.api.services import Services
from smelt.control import session_cleanup
from smelt.control.post_training import PostTraining
from smelt.control.session_cleanup import SessionCleanup
from smelt.errors import NotFound
from smelt.storage import records
from smelt.storage.records import Record, SamplerRecord, SavedWeights, Session, TrainingModel

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(30)]

LONG_AGO = time.time() - 10 * 86400
MODEL = TrainingModel(
    owner="ann", id="s:train:0", created=LONG_AGO, session_id="s", number=0, base_model="t", served_model="t", rank=4
)
WEIGHTS = SavedWeights(
    owner="ann", model_id=MODEL.id, type="weights", name="w", folder="sessions/s_train_0/weights/w", future_id=None
)


@pytest.fixture
def services(tmp_path: Path) -> Iterator[Services]:
    with services_in(tmp_path / "home") as services:
        yield services


@pytest.fixture
def training(services: Services) -> PostTraining:
    return services.post_training


def keep(services: Services, *kept: Record) -> None:
    for record in kept:
        services.writer.write(lambda connection, record=record: records.add(connection, record)).result(5)


def folder(services: Services, name: str) -> Path:
    path = services.settings.home / name
    path.mkdir(parents=True)
    (path / "file").write_text("x")
    return path


def cleanup_of(services: Services) -> SessionCleanup:
    return SessionCleanup(services.post_training, services.database, services.writer, services.settings.home)


def sampler(number: int, created: float = LONG_AGO) -> SamplerRecord:
    name = f"s:sample:{number}"
    return SamplerRecord(
        owner="ann", id=name, created=created, session_id="s", base_model="t", served_model="t", lane=MODEL.id,
        seq=number, folder=f"sessions/s_train_0/ephemeral/{name.replace(':', '_')}",
    )  # fmt: skip


async def test_expired_weights_go_with_their_files_unless_a_copy_has_them(
    services: Services, training: PostTraining
) -> None:
    other = replace(WEIGHTS, id="o", name="o", folder="sessions/s_train_0/weights/o", expires=LONG_AGO)
    copied = replace(WEIGHTS, id="c", type="sampler_weights", expires=LONG_AGO)
    keep(services, Session(owner="ann", id="s"), MODEL, WEIGHTS, other, copied)
    stays, goes = folder(services, WEIGHTS.folder), folder(services, other.folder)
    with pytest.raises(NotFound):
        await training.weights.find("ann", f"tinker://{MODEL.id}/weights/o")
    await cleanup_of(services).tidy()
    assert (stays.exists(), goes.exists()) == (True, False)
    assert (await training.weights.page(9, 0, owner="ann"))[0] == [WEIGHTS]


async def test_samplers_that_nobody_asks_go_but_for_the_newest(
    services: Services, training: PostTraining, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_cleanup, "NUM_KEPT", 1)
    old, used, newest = sampler(1), sampler(2), sampler(3, LONG_AGO + 1)
    keep(services, Session(owner="ann", id="s"), MODEL, old, used, newest)
    folders = {each.id: folder(services, each.folder or "") for each in (old, used, newest)}
    monkeypatch.setattr(training.samplers, "_started", time.monotonic() - 2 * session_cleanup.GRACE_S)
    await training.samplers.find("ann", used.id)
    await cleanup_of(services).tidy()
    assert {name for name, path in folders.items() if path.exists()} == {used.id, newest.id}
    with pytest.raises(NotFound):
        await training.samplers.find("ann", old.id)


async def test_nothing_goes_soon_after_a_start(services: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_cleanup, "NUM_KEPT", 0)
    keep(services, Session(owner="ann", id="s"), MODEL, sampler(1))
    kept = folder(services, sampler(1).folder or "")
    await cleanup_of(services).tidy()
    assert kept.exists(), "its client may have asked before the restart"


async def test_the_models_of_a_finished_session_are_given_up_with_their_logs(
    services: Services, training: PostTraining, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep(services, Session(owner="ann", id="s", finished=time.time()), MODEL)
    snapshots = folder(services, "sessions/s_train_0/snapshots")
    cleanup = cleanup_of(services)
    await cleanup.tidy()
    assert (await training.models.find("ann", MODEL.id)).unloaded is None, "it may be looked at for a while"
    monkeypatch.setattr(session_cleanup, "GRACE_S", 0.0)
    await cleanup.tidy()
    assert (await training.models.find("ann", MODEL.id)).unloaded is not None
    assert not snapshots.exists()
    epoch = await services.ledger.open_epoch()
    [granted] = await services.ledger.next_grants(epoch, 9, ("unload_model",))
    assert granted.lane == MODEL.id
    await cleanup.tidy()
    assert await services.ledger.log(MODEL.id, -1, 9).__anext__(), "what is being done keeps its request"


async def test_what_is_made_again_of_a_sampler_that_is_gone_goes_too(
    services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_cleanup, "GRACE_S", 0.0)
    orphan = folder(services, "sessions/s_train_0/ephemeral/s_sample_9")
    await cleanup_of(services).tidy()
    assert not orphan.exists()
