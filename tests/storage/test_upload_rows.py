"""Uploads in parts as rows: what counts as pending, what one holds, and that all of it ends in time."""

import pytest
from sqlalchemy import Connection, Engine

from smelt.storage import records, upload_rows
from smelt.storage.records import ChunkedUpload, UploadPart


def upload(name: str, expires: float, state: str = "pending", owner: str = "ann") -> ChunkedUpload:
    return ChunkedUpload(owner=owner, id=name, name="a", purpose="batch", num_bytes=9, expires=expires, state=state)


UPLOADS = [
    upload("old", 100.0),
    upload("over", 200.0),
    upload("done", 200.0, "completed"),
    upload("open", 300.0),
    upload("bobs", 300.0, owner="bob"),
]


@pytest.fixture
def connection(engine: Engine) -> Connection:
    with engine.begin() as connection:
        for each in UPLOADS:
            records.add(connection, each)
        for number, name in enumerate(["old", "over", "open", "open", "bobs"]):
            owner = "bob" if name == "bobs" else "ann"
            records.add(connection, UploadPart(owner=owner, id=f"p{number}", upload_id=name, num_bytes=2**40 + number))
        yield connection


def test_an_upload_is_pending_until_its_time_is_over(connection: Connection) -> None:
    assert [upload_rows.num_pending(connection, "ann", now) for now in (0.0, 150.0, 200.0, 300.0)] == [3, 2, 1, 0]
    assert upload_rows.num_pending(connection, "bob", 250.0) == 1


def test_an_upload_holds_its_own_parts(connection: Connection) -> None:
    assert upload_rows.held(connection, "open") == (2, 2**41 + 5)
    assert upload_rows.held(connection, "done") == (0, 0)
    upload_rows.remove_parts(connection, "open")
    assert upload_rows.held(connection, "open") == (0, 0)
    assert upload_rows.held(connection, "bobs") == (1, 2**40 + 4)


def test_uploads_end_and_are_forgotten_later(connection: Connection) -> None:
    upload_rows.expire(connection, 200.0, kept_s=100.0)
    found = {each.id: each.state for each in records.of_all_owners(connection, ChunkedUpload)}
    assert found == {"over": "expired", "done": "completed", "open": "pending", "bobs": "pending"}
    assert {each.upload_id for each in records.of_all_owners(connection, UploadPart)} == {"open", "bobs"}
    upload_rows.expire(connection, 400.0, kept_s=100.0)
    assert records.of_all_owners(connection, ChunkedUpload) == []
    assert records.of_all_owners(connection, UploadPart) == []
