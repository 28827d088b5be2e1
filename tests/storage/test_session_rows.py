"""Questions about sessions of training by request, on both databases."""

import asyncio
from collections.abc import Iterator

import pytest
from sqlalchemy import Connection, Engine

from smelt.storage import records, session_rows
from smelt.storage.files import Files
from smelt.storage.futures import Ledger
from smelt.storage.records import Record, SamplerRecord, SavedWeights, Session, TrainingModel
from smelt.storage.transitions import Submission
from smelt.storage.writer import Writer

LANE = "s:train:0"
SESSIONS = [Session(owner="ann", id="s", created=1.0, project_id="p"), Session(owner="ann", id="z", created=2.0)]
MODELS = [
    TrainingModel(
        owner="ann", id=f"{session}:train:0", created=created, session_id=session, number=0, base_model="t",
        served_model="t", rank=4, unloaded=unloaded,
    )
    for session, created, unloaded in (("s", 1.0, None), ("z", 2.0, 5.0))
]  # fmt: skip
SAMPLERS = [
    SamplerRecord(owner="ann", id="s:sample:0", created=3.0, session_id="s", base_model="t", served_model="t"),
    SamplerRecord(
        owner="ann", id="s:sample:1", created=4.0, session_id="s", base_model="t", served_model="t", lane=LANE, seq=1
    ),
]


def weights(name: str, future_id: str | None, **changes: object) -> SavedWeights:
    values = {"owner": "ann", "id": name, "model_id": LANE, "type": "weights", "name": name, "folder": name}
    return SavedWeights(**(values | {"created": 1.0, "future_id": future_id} | changes))  # type: ignore[arg-type]


@pytest.fixture
def filled(engine: Engine, writer: Writer, files: Files) -> Iterator[tuple[Connection, list[str]]]:
    """(connection, ids of futures): the first of them is done, the second queued; so are the weights of them."""

    async def scenario() -> list[str]:
        ledger = Ledger(engine, writer, files)
        ids = [await ledger.accept(Submission("ann", "save_weights", "f", b"", LANE, seq)) for seq in (1, 2)]
        epoch = await ledger.open_epoch()
        [first] = await ledger.next_grants(epoch, 1, ("save_weights",))
        await ledger.finish(first.id, epoch, b"")
        return ids

    ids = asyncio.run(scenario())
    added: list[Record] = [*SESSIONS, *MODELS, *SAMPLERS]
    added += [weights("saved", ids[0]), weights("queued", ids[1]), weights("copy", None, created=2.0, is_public=True)]
    added += [weights("over", None, expires=5.0)]
    with engine.begin() as connection:
        for record in added:
            records.add(connection, record)
    with engine.connect() as connection:
        yield connection, ids


def test_weights_are_there_once_they_are_saved_and_until_they_expire(filled: tuple[Connection, list[str]]) -> None:
    connection, _ = filled
    found, total = session_rows.weights_page(connection, 9.0, 10, 0, {"owner": "ann"})
    assert ([each.name for each in found], total) == (["copy", "saved"], 2)
    found, total = session_rows.weights_page(connection, 4.0, 1, 1, {"model_id": LANE, "type": "weights"})
    assert (len(found), total) == (1, 3)
    assert session_rows.weights_page(connection, 9.0, 10, 0, {"owner": "bob"}) == ([], 0)
    assert [each.name for each in session_rows.expired_weights(connection, 9.0)] == ["over"]
    assert session_rows.has_public_weights(connection, LANE)
    assert not session_rows.has_public_weights(connection, MODELS[1].id)


def test_weights_are_found_with_how_they_stand(filled: tuple[Connection, list[str]]) -> None:
    connection, ids = filled
    states = {name: session_rows.any_weights(connection, LANE, "weights", name) for name in ("saved", "queued", "copy")}
    assert {name: found and found[1] for name, found in states.items()} == {
        "saved": "done",
        "queued": "queued",
        "copy": None,
    }
    assert session_rows.any_weights(connection, LANE, "sampler_weights", "saved") is None
    assert session_rows.is_folder_used(connection, "saved")
    assert not session_rows.is_folder_used(connection, "nowhere")
    assert session_rows.state_of(connection, ids[1]) == "queued"


def test_models_and_sessions_come_in_pages_newest_first(filled: tuple[Connection, list[str]]) -> None:
    connection, _ = filled
    assert session_rows.models_page(connection, "ann", 1, 0, None) == ([MODELS[1]], 2)
    assert session_rows.models_page(connection, "ann", 9, 0, "p") == ([MODELS[0]], 1)
    assert session_rows.models_page(connection, "bob", 9, 0, None) == ([], 0)
    assert session_rows.newest_sessions(connection, "ann", 1, 1) == [SESSIONS[0]]
    assert session_rows.any_model(connection, LANE) == MODELS[0]
    assert session_rows.any_model(connection, "x") is None
    assert session_rows.unloaded_models(connection, 9.0) == [MODELS[1].id]
    assert session_rows.unloaded_models(connection, 5.0) == []


def test_what_was_asked_of_a_session(filled: tuple[Connection, list[str]]) -> None:
    connection, _ = filled
    assert [row[:3] for row in session_rows.trace(connection, "s")] == [
        (LANE, "save_weights", "done"),
        (LANE, "save_weights", "queued"),
    ]
    assert session_rows.trace(connection, "z") == []
    assert session_rows.last_request(connection, LANE) is not None
    assert session_rows.last_request(connection, "x") is None
    assert session_rows.num_waiting(connection, "save_weights") == 1
    assert session_rows.ephemeral_samplers(connection) == [SAMPLERS[1]]
