"""The first schema: lanes, futures and epochs of the ledger, and the records. Frozen: later steps change it."""

from alembic.operations import Operations
from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Double,
    ForeignKeyConstraint,
    Integer,
    LargeBinary,
    PrimaryKeyConstraint,
    Text,
    UniqueConstraint,
    text,
)

COUNTER = BigInteger().with_variant(Integer(), "sqlite")


def upgrade(op: Operations) -> None:
    """Create every table."""
    _create_ledger(op)
    _index_futures(op)
    _create_records(op)


def _create_ledger(op: Operations) -> None:
    op.create_table(
        "epochs",
        Column("epoch", COUNTER, nullable=False),
        Column("closed", Boolean, nullable=False),
        PrimaryKeyConstraint("epoch", name="pk_epochs"),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "lanes",
        Column("lane", Text, nullable=False),
        Column("owner", Text, nullable=False),
        Column("next_seq", BigInteger),
        PrimaryKeyConstraint("lane", name="pk_lanes"),
    )
    op.create_table(
        "futures",
        Column("number", COUNTER, nullable=False),
        Column("id", Text, nullable=False),
        Column("owner", Text, nullable=False),
        Column("lane", Text),
        Column("seq", BigInteger),
        Column("fingerprint", Text, nullable=False),
        Column("kind", Text, nullable=False),
        Column("state", Text, nullable=False),
        Column("ready", Boolean, nullable=False),
        Column("epoch", BigInteger),
        Column("attempts", Integer, nullable=False),
        Column("category", Text),
        Column("request", LargeBinary),
        Column("request_file", Text),
        Column("result", LargeBinary),
        Column("result_file", Text),
        Column("expired", Boolean, nullable=False),
        Column("created", Double, nullable=False),
        Column("updated", Double, nullable=False),
        PrimaryKeyConstraint("number", name="pk_futures"),
        UniqueConstraint("id", name="uq_futures_id"),
        UniqueConstraint("lane", "seq", name="uq_futures_lane_seq"),
        ForeignKeyConstraint(["lane"], ["lanes.lane"], name="fk_futures_lane"),
        sqlite_autoincrement=True,
    )


def _index_futures(op: Operations) -> None:
    for name, columns, sqlite_where, postgresql_where in (
        ("ix_futures_ready", ["number"], "ready = 1", "ready"),
        ("ix_futures_queued", ["lane", "seq"], "state = 'queued'", "state = 'queued'"),
        ("ix_futures_granted", ["lane", "epoch"], "state = 'granted'", "state = 'granted'"),
    ):
        op.create_index(
            name, "futures", columns, sqlite_where=text(sqlite_where), postgresql_where=text(postgresql_where)
        )


def _create_records(op: Operations) -> None:
    for name, columns, constraints in (
        ("models", [_text("name"), _text("path")], [_unique("models", "owner", "name")]),
        (
            "adapters",
            [_text("name"), _text("path"), _text("model_id")],
            [
                _unique("adapters", "owner", "name"),
                ForeignKeyConstraint(["model_id"], ["models.id"], name="fk_adapters_model_id"),
            ],
        ),
        (
            "runs",
            [_text("recipe"), Column("config", JSON, nullable=False), _text("path"), _text("state"), _text("reason")],
            [],
        ),
        (
            "checkpoints",
            [_text("run_id"), Column("step", BigInteger, nullable=False), _text("path")],
            [
                _unique("checkpoints", "run_id", "step"),
                ForeignKeyConstraint(["run_id"], ["runs.id"], name="fk_checkpoints_run_id"),
            ],
        ),
        ("datasets", [_text("name"), _text("path")], [_unique("datasets", "owner", "name")]),
        (
            "keys",
            [_text("name"), _text("digest"), Column("scopes", JSON, nullable=False), Column("revoked", Double)],
            [_unique("keys", "owner", "name"), _unique("keys", "digest")],
        ),
    ):
        owned = [_text("id"), _text("owner"), Column("created", Double, nullable=False)]
        op.create_table(name, *owned, *columns, PrimaryKeyConstraint("id", name=f"pk_{name}"), *constraints)


def _text(name: str) -> Column[str]:
    return Column(name, Text, nullable=False)


def _unique(table: str, *columns: str) -> UniqueConstraint:
    return UniqueConstraint(*columns, name="_".join(["uq", table, *columns]))
