"""The fifth schema: uploads, batches of requests, fine-tuning that was asked for. Frozen: later steps change it."""

from typing import Any

from alembic.operations import Operations
from sqlalchemy import JSON, BigInteger, Column, Double, PrimaryKeyConstraint, Text


def upgrade(op: Operations) -> None:
    """Add the three tables and their indexes."""
    _create(
        op,
        "uploads",
        *[_text(name) for name in ("name", "purpose", "suffix")],
        Column("num_bytes", BigInteger, nullable=False),
        Column("expires", Double),
    )
    _create(
        op,
        "batch_jobs",
        *[_text(name) for name in ("endpoint", "input_file_id")],
        Column("key_id", Text),
        Column("deadline", Double, nullable=False),
        _text("status"),
        *[Column(name, JSON, nullable=False) for name in ("times", "errors")],
        *[Column(name, BigInteger, nullable=False) for name in ("num_requests", "num_completed", "num_failed")],
        Column("usage", JSON),
        *[Column(name, Text) for name in ("model", "output_file_id", "error_file_id")],
        Column("output_seconds", Double),
        Column("user_metadata", JSON),
    )
    _create(
        op,
        "fine_tuning_jobs",
        Column("run_id", Text),
        _text("model"),
        Column("request", JSON, nullable=False),
        _text("state"),
        Column("error", JSON),
        Column("fine_tuned_model", Text),
        Column("result_files", JSON, nullable=False),
        Column("trained_tokens", BigInteger),
        Column("finished", Double),
        Column("user_metadata", JSON),
    )


def _create(op: Operations, name: str, *rest: Column[Any]) -> None:
    owned = [_text("id"), _text("owner"), Column("created", Double, nullable=False)]
    op.create_table(name, *owned, *rest, PrimaryKeyConstraint("id", name=f"pk_{name}"))
    op.create_index(f"ix_{name}_owner_created", name, ["owner", "created"])


def _text(name: str) -> Column[Any]:
    return Column(name, Text, nullable=False)
