"""Databases: durable settings, URLs, migrations that lead to today's tables, and a clear word on newer ones."""

from collections.abc import Callable
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.operations import Operations
from sqlalchemy import Column, Engine, Integer, create_engine, inspect, select, text

from smelt.errors import ConfigError, OutOfSpace, StorageError
from smelt.storage import database, migrations, tables
from smelt.storage.database import check_integrity, open_database, sqlite_url, transaction
from smelt.storage.tables import lanes
from smelt.storage.writer import Writer


def pragma(engine: Engine, name: str) -> object:
    with engine.connect() as connection:
        return connection.execute(text(f"PRAGMA {name}")).scalar_one()


@pytest.fixture
def sqlite(tmp_path: Path) -> Engine:
    return open_database(sqlite_url(tmp_path / "smelt.db"))


def test_sqlite_is_set_to_keep_what_it_commits(sqlite: Engine) -> None:
    settings = {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "busy_timeout": 5000}
    assert {name: pragma(sqlite, name) for name in settings} == settings


def test_durability_can_be_left_out_and_comes_back(engine: Engine) -> None:
    question, yes, no = (
        ("PRAGMA synchronous", 2, 1) if engine.dialect.name == "sqlite" else ("SHOW synchronous_commit", "on", "off")
    )
    with engine.connect() as connection:
        for durable in (False, True, True, False):
            with transaction(connection, durable):
                assert connection.execute(text(question)).scalar_one() == (yes if durable else no)


def test_the_migrations_lead_to_the_tables_of_today(engine: Engine) -> None:
    with engine.connect() as connection:
        options = {"include_name": lambda name, kind, _: (kind, name) != ("table", "schema_version")}
        context = MigrationContext.configure(connection, opts=options | {"compare_type": True})
        assert compare_metadata(context, tables.metadata) == []
        indexes = inspect(connection).get_indexes("futures")
    assert {index.name for index in tables.futures.indexes} <= {index["name"] for index in indexes}


def test_every_record_has_an_owner() -> None:
    ownerless = {name for name, table in tables.metadata.tables.items() if "owner" not in table.c}
    assert ownerless == {"epochs"}


def test_opening_again_changes_nothing(opened: Callable[[], Engine]) -> None:
    first = opened()
    with first.begin() as connection:
        connection.execute(lanes.insert().values(lane="kept", owner="ann"))
    with opened().connect() as connection:
        assert connection.execute(select(lanes.c.lane)).scalars().all() == ["kept"]
        assert migrations.read_version(connection) == len(migrations.MIGRATIONS)


def test_a_newer_database_is_refused(engine: Engine, opened: Callable[[], Engine]) -> None:
    with engine.begin() as connection:
        connection.execute(migrations.schema_version.update().values(version=99))
    with pytest.raises(StorageError, match=f"schema version 99, and this smelt knows {len(migrations.MIGRATIONS)}"):
        opened()


def test_a_step_that_fails_leaves_no_trace(
    engine: Engine, opened: Callable[[], Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(op: Operations) -> None:
        op.create_table("unfinished", Column("number", Integer))
        op.drop_table("epochs")
        raise ZeroDivisionError

    monkeypatch.setattr(migrations, "MIGRATIONS", (*migrations.MIGRATIONS, fail))
    with pytest.raises(ZeroDivisionError):
        opened()
    monkeypatch.undo()
    with opened().connect() as connection:
        names = inspect(connection).get_table_names()
    assert "epochs" in names
    assert "unfinished" not in names


@pytest.mark.parametrize("url", ["mysql://here/there", "no url"])
def test_other_databases_are_refused_by_name(url: str) -> None:
    with pytest.raises(ConfigError, match="postgresql://"):
        open_database(url)


def test_a_database_out_of_reach_is_named_without_its_password(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="nowhere"):
        open_database(sqlite_url(tmp_path / "nowhere" / "smelt.db"))
    with pytest.raises(StorageError, match=r"ann:\*\*\*@127.0.0.1:1/smelt") as caught:
        open_database("postgresql://ann:secret@127.0.0.1:1/smelt")
    assert "secret" not in str(caught.value)


def test_a_full_disk_is_said_and_got_over(sqlite: Engine) -> None:
    writer = Writer(sqlite)
    assert writer.write(lambda connection: connection.execute(text("PRAGMA max_page_count = 40")).scalar()).result(5)
    full = writer.write(lambda connection: connection.execute(lanes.insert().values(lane="x" * 10**6, owner="ann")))
    with pytest.raises(OutOfSpace, match="Free some space"):
        full.result(5)
    small = writer.write(lambda connection: connection.execute(lanes.insert().values(lane="x", owner="ann")).rowcount)
    assert small.result(5) == 1
    writer.close()
    sqlite.dispose()


def test_damage_is_found_at_the_start_where_looking_is_quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "smelt.db"
    open_database(sqlite_url(path)).dispose()
    engine = open_database(sqlite_url(path))
    check_integrity(engine)
    with engine.connect() as connection:
        page = connection.execute(text("SELECT rootpage FROM sqlite_schema WHERE name = 'runs'")).scalar_one()
    engine.dispose()
    data = bytearray(path.read_bytes())
    page_bytes = int.from_bytes(data[16:18], "big")
    data[(page - 1) * page_bytes : page * page_bytes] = bytes([0xAA]) * page_bytes
    path.write_bytes(data)
    damaged = create_engine(sqlite_url(path))
    with pytest.raises(StorageError, match="smelt.db"):
        check_integrity(damaged)
    monkeypatch.setattr(database, "MAX_CHECKED_BYTES", len(data) - 1)
    check_integrity(damaged)
    damaged.dispose()
