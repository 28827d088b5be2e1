"""The writer: groups in order, one commit for those who wait, and an error only for whom it belongs to."""

import threading
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, event, select, text

from smelt.errors import NotFound, StorageError
from smelt.storage.tables import lanes
from smelt.storage.writer import Operation, Writer


def _add_lane(connection: Connection, name: str) -> str:
    insert = lanes.insert().values(lane=name, owner="ann").returning(lanes.c.lane)
    return connection.execute(insert).scalar_one()


def add_lane(name: str) -> Any:
    return lambda connection: _add_lane(connection, name)


def names(engine: Engine) -> set[str]:
    with engine.connect() as connection:
        return set(connection.execute(select(lanes.c.lane)).scalars())


def write_and_fail(connection: Connection) -> None:
    add_lane("half")(connection)
    raise NotFound("on purpose")


def test_what_waits_together_is_committed_together(engine: Engine, writer: Writer) -> None:
    commits: list[Connection] = []
    event.listen(engine, "commit", commits.append)
    is_running, may_go_on = threading.Event(), threading.Event()

    def hold(connection: Connection) -> None:
        is_running.set()
        assert may_go_on.wait(5)

    held = writer.write(hold)
    assert is_running.wait(5)
    waiting = [writer.write(add_lane(str(number))) for number in range(20)]
    assert not names(engine)
    may_go_on.set()
    assert held.result(5) is None
    assert [answer.result(5) for answer in waiting] == [str(number) for number in range(20)]
    assert len(commits) == 2


def test_an_error_is_its_own(engine: Engine, writer: Writer) -> None:
    def broken(_connection: Connection) -> None:
        raise ZeroDivisionError

    operations = [Operation(run) for run in (add_lane("a"), write_and_fail, add_lane("a"), broken, add_lane("b"))]
    writer.submit(operations)
    assert (operations[0].answer.result(5), operations[4].answer.result(5)) == ("a", "b")
    for operation, error in zip(operations[1:4], (NotFound, StorageError, ZeroDivisionError), strict=True):
        with pytest.raises(error):
            operation.answer.result(5)
    assert names(engine) == {"a", "b"}
    assert writer.write(add_lane("c")).result(5) == "c"


def test_who_left_before_the_turn_changes_nothing(engine: Engine, writer: Writer) -> None:
    operation = Operation(add_lane("a"))
    assert operation.answer.cancel()
    writer.submit([operation])
    assert writer.write(add_lane("b")).result(5) == "b"
    assert names(engine) == {"b"}


def test_closing_finishes_what_was_submitted(engine: Engine) -> None:
    writer = Writer(engine)
    answers = [writer.write(add_lane(str(number))) for number in range(5)]
    writer.close()
    assert [answer.result(0) for answer in answers] == list("01234")
    with pytest.raises(StorageError, match="is closed"):
        writer.write(add_lane("late"))
    writer.close()


def test_the_writer_outlives_its_connection(engine: Engine, writer: Writer) -> None:
    if engine.dialect.name == "sqlite":
        pytest.skip("not on this platform: SQLite has no connection to lose")
    backend = writer.write(lambda connection: connection.execute(text("SELECT pg_backend_pid()")).scalar_one())
    with engine.begin() as connection:
        connection.execute(text("SELECT pg_terminate_backend(:backend, 5000)"), {"backend": backend.result(5)})
    lost = writer.write(add_lane("lost"))
    with pytest.raises(StorageError):
        lost.result(5)
    assert writer.write(add_lane("kept")).result(5) == "kept"
    assert names(engine) == {"kept"}
