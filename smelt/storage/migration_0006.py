"""The sixth schema: files that come in parts. Frozen: later steps change it."""

from typing import Any

from alembic.operations import Operations
from sqlalchemy import BigInteger, Column, Double, ForeignKeyConstraint, PrimaryKeyConstraint, Text


def upgrade(op: Operations) -> None:
    """Add the two tables and their indexes."""
    _create(
        op,
        "chunked_uploads",
        *[_text(name) for name in ("name", "purpose")],
        Column("num_bytes", BigInteger, nullable=False),
        Column("expires", Double, nullable=False),
        Column("file_seconds", Double),
        _text("state"),
        Column("file_id", Text),
    )
    _create(
        op,
        "upload_parts",
        _text("upload_id"),
        Column("num_bytes", BigInteger, nullable=False),
        ForeignKeyConstraint(["upload_id"], ["chunked_uploads.id"], name="fk_upload_parts_upload_id"),
    )
    op.create_index("ix_chunked_uploads_owner_state", "chunked_uploads", ["owner", "state"])
    op.create_index("ix_upload_parts_upload_id", "upload_parts", ["upload_id"])


def _create(op: Operations, name: str, *rest: Column[Any] | ForeignKeyConstraint) -> None:
    owned = [_text("id"), _text("owner"), Column("created", Double, nullable=False)]
    op.create_table(name, *owned, *rest, PrimaryKeyConstraint("id", name=f"pk_{name}"))


def _text(name: str) -> Column[Any]:
    return Column(name, Text, nullable=False)
