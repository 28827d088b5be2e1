"""The third schema: strikes for broken rules, and the bans that follow. Frozen: later steps change it."""

from alembic.operations import Operations
from sqlalchemy import Column, Double, PrimaryKeyConstraint, Text, UniqueConstraint


def upgrade(op: Operations) -> None:
    """Add the two tables."""
    for name, last in (("strikes", "rule"), ("bans", "reason")):
        texts = [Column(column, Text, nullable=False) for column in ("key_id", "user", last)]
        op.create_table(
            name,
            Column("id", Text, nullable=False),
            Column("owner", Text, nullable=False),
            Column("created", Double, nullable=False),
            *texts,
            PrimaryKeyConstraint("id", name=f"pk_{name}"),
            *([UniqueConstraint("key_id", "user", name="uq_bans_key_id_user")] if name == "bans" else []),
        )
    op.create_index("ix_strikes_key_id", "strikes", ["key_id"])
