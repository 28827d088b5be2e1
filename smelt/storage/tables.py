"""The tables as SQLAlchemy sees them today; how a database got there is in `migrations`.

Times are seconds since 1970. Every row that somebody asked for has an `owner`.
"""

from typing import Any, TypeAlias

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Double,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Row,
    Table,
    Text,
    UniqueConstraint,
    literal_column,
    text,
)
from sqlalchemy.schema import SchemaItem

AnyRow: TypeAlias = Row[*tuple[Any, ...]]

# States as the indexes have them. With a parameter in their place SQLite would plan a statement anew each time it runs.
QUEUED, GRANTED = (literal_column(f"'{state}'", Text) for state in ("queued", "granted"))

# Every constraint has a name, so that a later migration can drop it.
NAMES = {"ix": "ix_%(column_0_N_name)s", "uq": "uq_%(table_name)s_%(column_0_N_name)s", "pk": "pk_%(table_name)s"}
metadata = MetaData(naming_convention=NAMES | {"fk": "fk_%(table_name)s_%(column_0_N_name)s"})

# SQLite counts rows up by itself only in a column of the type INTEGER.
Counter = BigInteger().with_variant(Integer(), "sqlite")

# One connection of a worker; a result that comes with a closed epoch is refused.
epochs = Table(
    "epochs",
    metadata,
    Column("epoch", Counter, primary_key=True),
    Column("closed", Boolean, nullable=False),
    sqlite_autoincrement=True,
)

lanes = Table(
    "lanes",
    metadata,
    Column("lane", Text, primary_key=True),
    Column("owner", Text, nullable=False),
    # The lowest seq that was neither granted nor settled nor given up; NULL: the lane's futures have no order.
    Column("next_seq", BigInteger),
)

futures = Table(
    "futures",
    metadata,
    Column("number", Counter, primary_key=True),  # in order of acceptance
    Column("id", Text, nullable=False, unique=True),
    Column("owner", Text, nullable=False),
    Column("lane", Text, ForeignKey("lanes.lane")),
    Column("seq", BigInteger),
    Column("fingerprint", Text, nullable=False),
    Column("kind", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("ready", Boolean, nullable=False),  # queued, and its turn in its lane
    Column("epoch", BigInteger),
    Column("attempts", Integer, nullable=False),  # how often a worker died holding it
    Column("category", Text),  # of a failure: user or server
    Column("request", LargeBinary),
    Column("request_file", Text),
    Column("result", LargeBinary),
    Column("result_file", Text),
    Column("expired", Boolean, nullable=False),
    Column("created", Double, nullable=False),
    Column("updated", Double, nullable=False),
    UniqueConstraint("lane", "seq"),
    Index("ix_futures_ready", "kind", "number", sqlite_where=text("ready = 1"), postgresql_where=text("ready")),
    Index(
        "ix_futures_suspect",
        "number",
        sqlite_where=text("ready = 1 AND attempts > 0"),
        postgresql_where=text("ready AND attempts > 0"),
    ),
    Index(
        "ix_futures_queued",
        "lane",
        "seq",
        sqlite_where=text("state = 'queued'"),
        postgresql_where=text("state = 'queued'"),
    ),
    Index(
        "ix_futures_granted",
        "lane",
        "epoch",
        sqlite_where=text("state = 'granted'"),
        postgresql_where=text("state = 'granted'"),
    ),
    sqlite_autoincrement=True,
)


def _records(name: str, *rest: SchemaItem) -> Table:
    """A table of records, with the columns that each of them has."""
    return Table(
        name,
        metadata,
        Column("id", Text, primary_key=True),
        Column("owner", Text, nullable=False),
        Column("created", Double, nullable=False),
        *rest,
    )


models = _records(
    "models",
    Column("name", Text, nullable=False),
    Column("path", Text, nullable=False),
    UniqueConstraint("owner", "name"),
)

adapters = _records(
    "adapters",
    Column("name", Text, nullable=False),
    Column("path", Text, nullable=False),
    Column("model_id", Text, ForeignKey("models.id"), nullable=False),
    UniqueConstraint("owner", "name"),
)

runs = _records(
    "runs",
    Column("recipe", Text, nullable=False),
    Column("config", JSON, nullable=False),
    Column("path", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("reason", Text, nullable=False),
)

checkpoints = _records(
    "checkpoints",
    Column("run_id", Text, ForeignKey("runs.id"), nullable=False),
    Column("step", BigInteger, nullable=False),
    Column("path", Text, nullable=False),
    UniqueConstraint("run_id", "step"),
)

datasets = _records(
    "datasets",
    Column("name", Text, nullable=False),
    Column("path", Text, nullable=False),
    UniqueConstraint("owner", "name"),
)

# A rule that was broken, by a key or ("local") by whoever needs none, and by the user that the key named ("": none).
strikes = _records(
    "strikes",
    Column("key_id", Text, nullable=False),
    Column("user", Text, nullable=False),
    Column("rule", Text, nullable=False),
    Index("ix_strikes_key_id", "key_id"),
)

# A key, or one of its users, that may ask for nothing any more.
bans = _records(
    "bans",
    Column("key_id", Text, nullable=False),
    Column("user", Text, nullable=False),
    Column("reason", Text, nullable=False),
    UniqueConstraint("key_id", "user"),
)

keys = _records(
    "keys",
    Column("name", Text, nullable=False),
    Column("digest", Text, nullable=False, unique=True),  # the key itself is shown once and never kept
    Column("scopes", JSON, nullable=False),
    Column("revoked", Double),
    Column("requests_per_minute", Integer),
    Column("max_concurrent", Integer),
    UniqueConstraint("owner", "name"),
)

# A client's stay at the Tinker API, from its start until it says that it is done.
sessions = _records(
    "sessions",
    Column("display_name", Text),
    Column("project_id", Text),
    Column("tags", JSON, nullable=False),
    Column("user_metadata", JSON),
    Column("finished", Double),
    Column("ending", JSON),
    Index("ix_sessions_owner_created", "owner", "created"),
)

# A model in training by request. Its id is that of its lane.
training_models = _records(
    "training_models",
    Column("session_id", Text, ForeignKey("sessions.id"), nullable=False),
    Column("number", BigInteger, nullable=False),
    Column("base_model", Text, nullable=False),
    Column("served_model", Text, nullable=False),
    Column("rank", Integer, nullable=False),
    Column("train_attn", Boolean, nullable=False),
    Column("train_mlp", Boolean, nullable=False),
    Column("train_unembed", Boolean, nullable=False),
    Column("user_metadata", JSON),
    Column("unloaded", Double),
    UniqueConstraint("session_id", "number"),
    Index("ix_training_models_owner_created", "owner", "created"),
)

# Weights that were saved, and by which future: they are there once it is done.
saved_weights = _records(
    "saved_weights",
    Column("model_id", Text, ForeignKey("training_models.id"), nullable=False),
    Column("type", Text, nullable=False),
    Column("name", Text, nullable=False),
    Column("folder", Text, nullable=False),
    Column("future_id", Text),
    Column("is_public", Boolean, nullable=False),
    Column("expires", Double),
    Column("user_metadata", JSON),
    UniqueConstraint("model_id", "type", "name"),
    Index("ix_saved_weights_owner_created", "owner", "created"),
    Index("ix_saved_weights_folder", "folder"),
)

# Weights to sample from. Its id is that of the lane of its samples; `lane` and `seq` say where one was made that has
# no other name.
samplers = _records(
    "samplers",
    Column("session_id", Text, ForeignKey("sessions.id"), nullable=False),
    Column("base_model", Text, nullable=False),
    Column("served_model", Text, nullable=False),
    Column("path", Text),
    Column("folder", Text),
    Column("lane", Text),
    Column("seq", BigInteger),
    Index("ix_samplers_session_id", "session_id"),
    Index("ix_samplers_lane", "lane"),
)

# Files that were uploaded, or made for their owner: the content lies in the home folder, in a folder of that id.
uploads = _records(
    "uploads",
    Column("name", Text, nullable=False),
    Column("purpose", Text, nullable=False),
    Column("suffix", Text, nullable=False),
    Column("num_bytes", BigInteger, nullable=False),
    Column("expires", Double),
    Index("ix_uploads_owner_created", "owner", "created"),
)

# Files that come in parts; a part lies in the home folder, in the folder of its upload.
chunked_uploads = _records(
    "chunked_uploads",
    Column("name", Text, nullable=False),
    Column("purpose", Text, nullable=False),
    Column("num_bytes", BigInteger, nullable=False),
    Column("expires", Double, nullable=False),
    Column("file_seconds", Double),
    Column("state", Text, nullable=False),
    Column("file_id", Text),
    Index("ix_chunked_uploads_owner_state", "owner", "state"),
)

upload_parts = _records(
    "upload_parts",
    Column("upload_id", Text, ForeignKey("chunked_uploads.id"), nullable=False),
    Column("num_bytes", BigInteger, nullable=False),
    Index("ix_upload_parts_upload_id", "upload_id"),
)

# Many requests in one file, to be answered within a time; each of them is a future of the lane of that id.
batch_jobs = _records(
    "batch_jobs",
    Column("endpoint", Text, nullable=False),
    Column("input_file_id", Text, nullable=False),
    Column("key_id", Text),
    Column("deadline", Double, nullable=False),
    Column("status", Text, nullable=False),
    Column("times", JSON, nullable=False),
    Column("errors", JSON, nullable=False),
    Column("num_requests", BigInteger, nullable=False),
    Column("num_completed", BigInteger, nullable=False),
    Column("num_failed", BigInteger, nullable=False),
    Column("usage", JSON),
    Column("model", Text),
    Column("output_file_id", Text),
    Column("error_file_id", Text),
    Column("output_seconds", Double),
    Column("user_metadata", JSON),
    Index("ix_batch_jobs_owner_created", "owner", "created"),
)

# Fine-tuning that was asked for; its run tells how it goes.
fine_tuning_jobs = _records(
    "fine_tuning_jobs",
    Column("run_id", Text),
    Column("model", Text, nullable=False),
    Column("request", JSON, nullable=False),
    Column("state", Text, nullable=False),
    Column("error", JSON),
    Column("fine_tuned_model", Text),
    Column("result_files", JSON, nullable=False),
    Column("trained_tokens", BigInteger),
    Column("finished", Double),
    Column("user_metadata", JSON),
    Index("ix_fine_tuning_jobs_owner_created", "owner", "created"),
)
