"""Models, runs, datasets, keys, sessions and the like as rows; knows nothing of the folders they point to.

Each function is one statement on a connection, with the owner in it: another owner's row does not exist. Writing
ones are run by the `Writer`, reading ones on any connection of the engine.
"""

import time
import uuid
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from sqlalchemy import Connection, RowMapping, Table, literal, select, tuple_
from sqlalchemy.dialects import postgresql, sqlite

from smelt.errors import AlreadyExists, NotFound
from smelt.storage import tables


def new_id() -> str:
    """An id that nobody can guess."""
    return uuid.uuid4().hex


@dataclass(frozen=True, kw_only=True)
class Record:
    """What every row has."""

    owner: str
    id: str = field(default_factory=new_id)
    created: float = field(default_factory=time.time)


@dataclass(frozen=True, kw_only=True)
class Model(Record):
    """A model folder, under a name."""

    name: str
    path: str


@dataclass(frozen=True, kw_only=True)
class Adapter(Record):
    """LoRA weights for a model."""

    name: str
    path: str
    model_id: str


@dataclass(frozen=True, kw_only=True)
class Run(Record):
    """One training job: its recipe's name and config, and how it stands."""

    recipe: str
    config: dict[str, Any]
    path: str
    state: str = "queued"
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Checkpoint(Record):
    """Weights of a run at a step."""

    run_id: str
    step: int
    path: str


@dataclass(frozen=True, kw_only=True)
class Dataset(Record):
    """A dataset folder, under a name."""

    name: str
    path: str


@dataclass(frozen=True, kw_only=True)
class Key(Record):
    """An API key: the sha256 of its text, what it may do, and when it was revoked. A limit of None is none."""

    name: str
    digest: str
    scopes: list[str]
    revoked: float | None = None
    requests_per_minute: int | None = None
    max_concurrent: int | None = None


@dataclass(frozen=True, kw_only=True)
class Strike(Record):
    """A rule that was broken with a key ("local": without one), for a user that the key named ("": for none)."""

    key_id: str
    user: str
    rule: str


@dataclass(frozen=True, kw_only=True)
class Ban(Record):
    """A key ("local": whoever has none), or one of its users, that may ask for nothing."""

    key_id: str
    user: str  # "": the key, for whomever
    reason: str


@dataclass(frozen=True, kw_only=True)
class Session(Record):
    """A client's stay at the Tinker API; `ending` is what it said at its end."""

    display_name: str | None = None
    project_id: str | None = None
    tags: list[str] = field(default_factory=list)
    user_metadata: dict[str, Any] | None = None
    finished: float | None = None
    ending: dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class TrainingModel(Record):
    """A model in training by request: number so-and-so of its session. Its id is that of its lane."""

    session_id: str
    number: int
    base_model: str  # as the client calls it
    served_model: str  # as we call it
    rank: int
    train_attn: bool = True
    train_mlp: bool = True
    train_unembed: bool = True
    user_metadata: dict[str, Any] | None = None
    unloaded: float | None = None


@dataclass(frozen=True, kw_only=True)
class SavedWeights(Record):
    """Weights below the home folder, there once their future is done. A copy shares its folder and has no future."""

    model_id: str
    type: str  # weights, sampler_weights or external_weights, as in tinker://MODEL_ID/TYPE/NAME
    name: str
    folder: str
    future_id: str | None
    is_public: bool = False
    expires: float | None = None
    user_metadata: dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class SamplerRecord(Record):
    """Weights to sample from: of a base model, of a path, or of one place of a lane."""

    session_id: str
    base_model: str
    served_model: str
    path: str | None = None
    folder: str | None = None
    lane: str | None = None
    seq: int | None = None


@dataclass(frozen=True, kw_only=True)
class Upload(Record):
    """A file that was uploaded, or made for its owner. Its `name` is for people; only `suffix` is safe in a path."""

    name: str
    purpose: str
    suffix: str
    num_bytes: int
    expires: float | None = None


@dataclass(frozen=True, kw_only=True)
class ChunkedUpload(Record):
    """A file that comes in parts, and has so many bytes at the end. `expires` is its own end, not the file's."""

    name: str
    purpose: str
    num_bytes: int
    expires: float
    file_seconds: float | None = None  # that the file is kept
    state: str = "pending"
    file_id: str | None = None


@dataclass(frozen=True, kw_only=True)
class UploadPart(Record):
    """A part of one, which is on the disk."""

    upload_id: str
    num_bytes: int


@dataclass(frozen=True, kw_only=True)
class BatchJob(Record):
    """Many requests in one file. `times` says when it came to each status, `errors` what is wrong with its file."""

    endpoint: str
    input_file_id: str
    key_id: str | None  # of whoever asked
    deadline: float
    status: str = "validating"
    times: dict[str, float] = field(default_factory=dict)
    errors: list[dict[str, Any]] = field(default_factory=list)
    num_requests: int = 0
    num_completed: int = 0
    num_failed: int = 0
    usage: dict[str, Any] | None = None
    model: str | None = None
    output_file_id: str | None = None
    error_file_id: str | None = None
    output_seconds: float | None = None  # that what comes of it is kept
    user_metadata: dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class FineTuningJob(Record):
    """Fine-tuning that was asked for. Its run tells how it goes, once there is one; `state` what the run cannot."""

    model: str  # that it begins with
    request: dict[str, Any]
    run_id: str | None = None
    state: str = "validating_files"
    error: dict[str, Any] | None = None
    fine_tuned_model: str | None = None
    result_files: list[str] = field(default_factory=list)
    trained_tokens: int | None = None
    finished: float | None = None
    user_metadata: dict[str, Any] | None = None


TABLES: dict[type[Record], Table] = {
    Model: tables.models,
    Adapter: tables.adapters,
    Run: tables.runs,
    Checkpoint: tables.checkpoints,
    Dataset: tables.datasets,
    Key: tables.keys,
    Strike: tables.strikes,
    Ban: tables.bans,
    Session: tables.sessions,
    TrainingModel: tables.training_models,
    SavedWeights: tables.saved_weights,
    SamplerRecord: tables.samplers,
    Upload: tables.uploads,
    ChunkedUpload: tables.chunked_uploads,
    UploadPart: tables.upload_parts,
    BatchJob: tables.batch_jobs,
    FineTuningJob: tables.fine_tuning_jobs,
}

R = TypeVar("R", bound=Record)


def add(connection: Connection, record: Record) -> None:
    """Insert a record. AlreadyExists where its name (or whatever else must be unique) is taken."""
    table = TABLES[type(record)]
    # The two say it alike, each in a class of its own.
    insert_into = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
    insert = insert_into(table).values(asdict(record)).on_conflict_do_nothing().returning(table.c.id)
    if connection.execute(insert).one_or_none() is None:
        label = getattr(record, "name", record.id)
        raise AlreadyExists(f"{label!r} already exists in {table.name}; remove it, or choose another name")


def get(connection: Connection, kind: type[R], owner: str, record_id: str) -> R:
    """The owner's record of that id. NotFound where there is none."""
    found = find(connection, kind, owner, id=record_id)
    if not found:
        raise _not_found(kind, record_id)
    return found[0]


def find(connection: Connection, kind: type[R], owner: str, **equal: Any) -> list[R]:
    """The owner's records whose columns have those values, oldest first."""
    table = TABLES[kind]
    query = select(table).where(table.c.owner == owner).filter_by(**equal).order_by(table.c.created, table.c.id)
    return [_record(kind, row) for row in connection.execute(query).mappings()]


def page(
    connection: Connection,
    kind: type[R],
    owner: str,
    limit: int,
    after: str | None = None,
    *,
    newest_first: bool = True,
    **equal: Any,
) -> list[R]:
    """The owner's records whose columns have those values, in order of creation, from behind the one of that id.

    NotFound where the owner has none of that id.
    """
    table = TABLES[kind]
    place = (table.c.created, table.c.id)
    query = select(table).where(table.c.owner == owner).filter_by(**equal)
    if after is not None:
        last = get(connection, kind, owner, after)
        here = tuple_(*place)
        there = tuple_(literal(last.created), literal(last.id))
        query = query.where(here < there if newest_first else here > there)
    ordered = query.order_by(*[column.desc() if newest_first else column for column in place])
    return [_record(kind, row) for row in connection.execute(ordered.limit(limit)).mappings()]


def replace(connection: Connection, record: Record) -> None:
    """Write a changed record over the one with its id. NotFound where the owner has none."""
    table = TABLES[type(record)]
    update = table.update().where(table.c.owner == record.owner, table.c.id == record.id).values(asdict(record))
    if connection.execute(update).rowcount != 1:
        raise _not_found(type(record), record.id)


def delete(connection: Connection, kind: type[Record], owner: str, record_id: str) -> None:
    """Remove a record. NotFound where the owner has none; StorageError where another record still points to it."""
    table = TABLES[kind]
    if connection.execute(table.delete().where(table.c.owner == owner, table.c.id == record_id)).rowcount != 1:
        raise _not_found(kind, record_id)


def all_keys(connection: Connection) -> list[Key]:
    """Every key, whoever owns it, oldest first: the one question whose answer is the owner."""
    return of_all_owners(connection, Key)


def of_all_owners(connection: Connection, kind: type[R], **equal: Any) -> list[R]:
    """Whoever owns them, oldest first: for what the operator alone asks."""
    table = TABLES[kind]
    query = select(table).filter_by(**equal).order_by(table.c.created, table.c.id)
    return [_record(kind, row) for row in connection.execute(query).mappings()]


def _record(kind: type[R], row: RowMapping) -> R:
    return kind(**{str(name): value for name, value in row.items()})


def _not_found(kind: type[Record], record_id: str) -> NotFound:
    return NotFound(f"{kind.__name__.lower()} {record_id!r} does not exist")
