"""The fourth schema: sessions of training by request and what belongs to them. Frozen: later steps change it."""

from typing import Any

from alembic.operations import Operations
from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Double,
    ForeignKeyConstraint,
    Integer,
    PrimaryKeyConstraint,
    Text,
    UniqueConstraint,
)


def upgrade(op: Operations) -> None:
    """Add the four tables and their indexes."""
    _create(
        op,
        "sessions",
        Column("display_name", Text),
        Column("project_id", Text),
        Column("tags", JSON, nullable=False),
        Column("user_metadata", JSON),
        Column("finished", Double),
        Column("ending", JSON),
    )
    _create_models(op)
    _create_weights(op)
    _create_samplers(op)
    for table, columns in (
        ("sessions", ["owner", "created"]),
        ("training_models", ["owner", "created"]),
        ("saved_weights", ["owner", "created"]),
        ("saved_weights", ["folder"]),
        ("samplers", ["session_id"]),
        ("samplers", ["lane"]),
    ):
        op.create_index("_".join(["ix", table, *columns]), table, columns)


def _create_models(op: Operations) -> None:
    _create(
        op,
        "training_models",
        _text("session_id"),
        Column("number", BigInteger, nullable=False),
        _text("base_model"),
        _text("served_model"),
        Column("rank", Integer, nullable=False),
        *[Column(name, Boolean, nullable=False) for name in ("train_attn", "train_mlp", "train_unembed")],
        Column("user_metadata", JSON),
        Column("unloaded", Double),
        ForeignKeyConstraint(["session_id"], ["sessions.id"], name="fk_training_models_session_id"),
        UniqueConstraint("session_id", "number", name="uq_training_models_session_id_number"),
    )


def _create_weights(op: Operations) -> None:
    _create(
        op,
        "saved_weights",
        *[_text(name) for name in ("model_id", "type", "name", "folder")],
        Column("future_id", Text),
        Column("is_public", Boolean, nullable=False),
        Column("expires", Double),
        Column("user_metadata", JSON),
        ForeignKeyConstraint(["model_id"], ["training_models.id"], name="fk_saved_weights_model_id"),
        UniqueConstraint("model_id", "type", "name", name="uq_saved_weights_model_id_type_name"),
    )


def _create_samplers(op: Operations) -> None:
    _create(
        op,
        "samplers",
        *[_text(name) for name in ("session_id", "base_model", "served_model")],
        *[Column(name, Text) for name in ("path", "folder", "lane")],
        Column("seq", BigInteger),
        ForeignKeyConstraint(["session_id"], ["sessions.id"], name="fk_samplers_session_id"),
    )


def _create(op: Operations, name: str, *rest: Column[Any] | ForeignKeyConstraint | UniqueConstraint) -> None:
    owned = [_text("id"), _text("owner"), Column("created", Double, nullable=False)]
    op.create_table(name, *owned, *rest, PrimaryKeyConstraint("id", name=f"pk_{name}"))


def _text(name: str) -> Column[Any]:
    return Column(name, Text, nullable=False)
