"""The seventh schema: ready futures are indexed by kind, and those whose worker died. Frozen: later steps change it."""

from alembic.operations import Operations
from sqlalchemy import text


def upgrade(op: Operations) -> None:
    """Put one index in the place of another, and add one."""
    op.drop_index("ix_futures_ready", "futures")
    _create(op, "ix_futures_ready", ["kind", "number"], "ready = 1", "ready")
    _create(op, "ix_futures_suspect", ["number"], "ready = 1 AND attempts > 0", "ready AND attempts > 0")


def _create(op: Operations, name: str, columns: list[str], sqlite: str, postgresql: str) -> None:
    op.create_index(name, "futures", columns, sqlite_where=text(sqlite), postgresql_where=text(postgresql))
