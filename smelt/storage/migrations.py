"""Brings a database to today's schema: a list of steps, each run once, forward only, all in one transaction.

The steps are written with Alembic's operations. Alembic's own bookkeeping (a tree of revision files in a folder,
with branches and downgrades) is left out: our steps are a line, and the version is how many of them were run.
"""

from collections.abc import Callable

from alembic.migration import MigrationContext
from alembic.operations import Operations
from sqlalchemy import BigInteger, Column, Connection, Engine, MetaData, Table, inspect, select, text

from smelt.errors import StorageError
from smelt.storage import (
    migration_0001,
    migration_0002,
    migration_0003,
    migration_0004,
    migration_0005,
    migration_0006,
    migration_0007,
)

# To change the schema: change `tables`, write the step that leads there, and add it here. Never edit an old one.
MIGRATIONS: tuple[Callable[[Operations], None], ...] = (
    migration_0001.upgrade,
    migration_0002.upgrade,
    migration_0003.upgrade,
    migration_0004.upgrade,
    migration_0005.upgrade,
    migration_0006.upgrade,
    migration_0007.upgrade,
)

schema_version = Table("schema_version", MetaData(), Column("version", BigInteger, nullable=False))

# Any number will do, as long as it is always this one.
POSTGRES_LOCK = 0x5EED_DA7A


def migrate(engine: Engine) -> None:
    """Run the steps that this database has not seen. StorageError where it has seen more than we know."""
    with engine.begin() as connection:
        if connection.dialect.name == "postgresql":
            connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": POSTGRES_LOCK})
        version = read_version(connection)
        if version > len(MIGRATIONS):
            place = engine.url.render_as_string(hide_password=True)
            raise StorageError(
                f"{place} has schema version {version}, and this smelt knows {len(MIGRATIONS)}: "
                "use the newer smelt that wrote it, or a copy from before"
            )
        operations = Operations(MigrationContext.configure(connection))
        for upgrade in MIGRATIONS[version:]:
            upgrade(operations)
        connection.execute(schema_version.update().values(version=len(MIGRATIONS)))


def read_version(connection: Connection) -> int:
    """How many steps this database has seen; a new one learns here to remember it."""
    if not inspect(connection).has_table(schema_version.name):
        schema_version.create(connection)
        connection.execute(schema_version.insert().values(version=0))
    return connection.execute(select(schema_version.c.version)).scalar_one()
