"""Opens the database: SQLite in a file by default, PostgreSQL by URL; knows its manners, none of its rows."""

import logging
import sqlite3
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from sqlalchemy import Connection, Engine, create_engine, event, make_url
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import ArgumentError, DBAPIError

from smelt.errors import ConfigError, OutOfSpace, StorageError
from smelt.storage.migrations import migrate

log = logging.getLogger(__name__)

# Execution options of a connection: `writes` takes SQLite's write lock at BEGIN instead of half-way through.
WRITES = "writes"
MAX_CHECKED_BYTES = 2**30  # two seconds of reading on a busy machine, with the file in memory
# What `transaction` remembers of a SQLite connection.
SYNCHRONOUS = "synchronous"

PRAGMAS = (
    "PRAGMA journal_mode = WAL",  # readers and the writer do not wait for each other
    "PRAGMA synchronous = FULL",  # a commit is on the disk when it returns; NORMAL loses it with the power
    "PRAGMA busy_timeout = 5000",  # milliseconds, for a backup or a shell that looks in
    "PRAGMA foreign_keys = ON",
    "PRAGMA journal_size_limit = 67108864",  # bytes of WAL that stay after a burst
)


def sqlite_url(path: Path) -> str:
    """The URL of a SQLite file."""
    return f"sqlite:///{path}"


def open_database(url: str) -> Engine:
    """An engine whose database has today's schema, which is created or brought up to date first.

    ConfigError for a URL that is not SQLite's or PostgreSQL's, StorageError where the database cannot be opened or
    was written by a newer smelt.
    """
    engine = _engine(url)
    with ExitStack() as on_failure:
        on_failure.callback(engine.dispose)
        try:
            migrate(engine.execution_options(**{WRITES: True}))
        except DBAPIError as error:
            raise explained(error, engine) from None
        on_failure.pop_all()
    return engine


def check_integrity(engine: Engine) -> None:
    """StorageError where a SQLite file is damaged; PostgreSQL looks after itself.

    A file beyond MAX_CHECKED_BYTES is only opened: the check reads all of it, and a server that restarts after a crash
    has to be there within seconds. What is damaged there is noticed when it is read.
    """
    if engine.dialect.name != "sqlite":
        return
    try:
        with engine.connect() as connection:
            num_pages, page_bytes = (
                connection.exec_driver_sql(f"PRAGMA {name}").scalar_one() for name in ("page_count", "page_size")
            )
            if num_pages * page_bytes > MAX_CHECKED_BYTES:
                log.info("%s is too large to be checked at each start", engine.url.database)
                return
            found = connection.exec_driver_sql("PRAGMA quick_check(1)").scalar_one()
    except DBAPIError as error:
        raise explained(error, engine) from None
    if found != "ok":
        raise StorageError(f"{engine.url.database} is damaged ({found}); restore a copy, or move it out of the way")


def explained(error: DBAPIError, engine: Engine) -> OutOfSpace | StorageError:
    """What went wrong in the database's own words, with its place (and no password) before them."""
    place = engine.url.render_as_string(hide_password=True)
    if is_full(error):
        return OutOfSpace(f"the disk of {place} is full; nothing was written. Free some space and try again")
    return StorageError(f"{place}: {str(error.orig).strip()}")


def is_full(error: DBAPIError) -> bool:
    """Whether the database says that its disk is full."""
    sqlite_code, sql_state = (getattr(error.orig, name, None) for name in ("sqlite_errorcode", "sqlstate"))
    return sqlite_code == sqlite3.SQLITE_FULL or sql_state == "53100"


@contextmanager
def transaction(connection: Connection, durable: bool = True) -> Iterator[None]:
    """A transaction whose commit, if `durable`, is on the disk when the block has ended.

    Otherwise the commit may vanish with the power, though never in part, and never without those after it.
    """
    if connection.dialect.name == "sqlite":
        _set_synchronous(connection, "FULL" if durable else "NORMAL")
    with connection.begin():
        if connection.dialect.name == "postgresql" and not durable:
            connection.exec_driver_sql("SET LOCAL synchronous_commit = off")
        yield


def _set_synchronous(connection: Connection, level: str) -> None:
    # SQLite takes it only between transactions, where SQLAlchemy would begin one to send it.
    if connection.info.get(SYNCHRONOUS, "FULL") != level:
        driver = connection.connection.driver_connection
        assert driver is not None
        driver.execute(f"PRAGMA synchronous = {level}")
        connection.info[SYNCHRONOUS] = level


def _engine(url: str) -> Engine:
    try:
        parsed = make_url(url)
    except ArgumentError:
        raise ConfigError(f"{url!r} is not the URL of a database; write postgresql://USER@HOST/NAME") from None
    if parsed.drivername == "sqlite":
        return _sqlite_engine(url)
    if parsed.drivername in ("postgresql", "postgres"):
        # A connection that died while it lay in the pool is noticed before it is used.
        return create_engine(parsed.set(drivername="postgresql+psycopg"), pool_size=16, pool_pre_ping=True)
    raise ConfigError(f"database {parsed.drivername}:// is not supported; use postgresql:// or sqlite:///FILE")


def _sqlite_engine(url: str) -> Engine:
    engine = create_engine(url, pool_size=16)
    event.listen(engine, "connect", _set_pragmas)
    event.listen(engine, "begin", _begin)
    return engine


def _set_pragmas(connection: DBAPIConnection, _record: object) -> None:
    # Python's driver would begin transactions by its own rules, and never one around CREATE TABLE.
    connection.isolation_level = None
    for pragma in PRAGMAS:
        connection.cursor().execute(pragma)


def _begin(connection: Connection) -> None:
    writes = connection.get_execution_options().get(WRITES)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
