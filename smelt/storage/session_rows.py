"""Questions about sessions of training by request, and what belongs to them; knows no folder and no protocol.

Pure SQL. What anybody may ask is given whoever owns it: the caller compares the owner, or whether it is public.
"""

from collections.abc import Mapping, Sequence
from typing import TypeVar

from sqlalchemy import Connection, Select, and_, func, or_, select, text

from smelt.storage import records
from smelt.storage.records import Record, SamplerRecord, SavedWeights, Session, TrainingModel
from smelt.storage.tables import AnyRow, futures, samplers, saved_weights, sessions, training_models

R = TypeVar("R", bound=Record)
Page = tuple[list[R], int]  # and how many there are in all

_is_there = or_(saved_weights.c.future_id.is_(None), futures.c.state == "done")


def newest_sessions(connection: Connection, owner: str, limit: int, offset: int = 0) -> list[Session]:
    """The owner's sessions, newest first."""
    query = select(sessions).where(sessions.c.owner == owner)
    ordered = query.order_by(sessions.c.created.desc(), sessions.c.id.desc()).limit(limit).offset(offset)
    return [Session(**row) for row in connection.execute(ordered).mappings()]


def models_page(
    connection: Connection, owner: str, limit: int, offset: int, project_id: str | None
) -> Page[TrainingModel]:
    """The owner's models, newest first; with a project, those of its sessions."""
    query = select(training_models).where(training_models.c.owner == owner)
    if project_id is not None:
        of_project = select(sessions.c.id).where(sessions.c.project_id == project_id)
        query = query.where(training_models.c.session_id.in_(of_project))
    ordered = query.order_by(training_models.c.created.desc(), training_models.c.id.desc())
    found = [TrainingModel(**row) for row in connection.execute(ordered.limit(limit).offset(offset)).mappings()]
    return found, _count(connection, query)


def any_model(connection: Connection, model_id: str) -> TrainingModel | None:
    """The model of that id, whoever owns it."""
    found = records.of_all_owners(connection, TrainingModel, id=model_id)
    return found[0] if found else None


def num_unfinished(connection: Connection, session_id: str) -> dict[str, int]:
    """lane -> how many requests of it are not finished, of the lanes of a session."""
    query = select(futures.c.lane, func.count()).group_by(futures.c.lane)
    is_unfinished = or_(text("state = 'queued'"), text("state = 'granted'"))  # as the indexes have it
    of_session = futures.c.lane.startswith(f"{session_id}:", autoescape=True)
    return {str(lane): int(num) for lane, num in connection.execute(query.where(is_unfinished, of_session))}


def any_weights(connection: Connection, model_id: str, kind: str, name: str) -> tuple[SavedWeights, str | None] | None:
    """The weights of that place, whoever owns them, and the state of the future that saves them."""
    found = records.of_all_owners(connection, SavedWeights, model_id=model_id, type=kind, name=name)
    return (found[0], state_of(connection, found[0].future_id)) if found else None


def weights_page(
    connection: Connection, now: float, limit: int, offset: int, equal: Mapping[str, str]
) -> Page[SavedWeights]:
    """Weights that are there and whose columns have those values, newest first."""
    query = select(saved_weights).join(futures, futures.c.id == saved_weights.c.future_id, isouter=True)
    query = query.where(_is_there, or_(saved_weights.c.expires.is_(None), saved_weights.c.expires > now))
    query = query.where(*[saved_weights.c[name] == value for name, value in equal.items()])
    ordered = query.order_by(saved_weights.c.created.desc(), saved_weights.c.id.desc()).limit(limit).offset(offset)
    found = [SavedWeights(**row) for row in connection.execute(ordered).mappings()]
    return found, _count(connection, query)


def has_public_weights(connection: Connection, model_id: str) -> bool:
    """Whether a model has weights that everybody may read."""
    query = select(saved_weights.c.id).where(saved_weights.c.model_id == model_id, saved_weights.c.is_public).limit(1)
    return connection.execute(query).first() is not None


def expired_weights(connection: Connection, now: float) -> list[SavedWeights]:
    """Weights whose time is over, whoever owns them."""
    query = select(saved_weights).where(saved_weights.c.expires <= now)
    return [SavedWeights(**row) for row in connection.execute(query).mappings()]


def is_folder_used(connection: Connection, folder: str) -> bool:
    """Whether any weights lie in that folder."""
    query = select(saved_weights.c.id).where(saved_weights.c.folder == folder).limit(1)
    return connection.execute(query).first() is not None


def state_of(connection: Connection, future_id: str | None) -> str | None:
    """How a future stands; None where there is none."""
    return connection.execute(select(futures.c.state).where(futures.c.id == future_id)).scalar_one_or_none()


def last_request(connection: Connection, lane: str) -> float | None:
    """When the last request of a lane was accepted."""
    query = select(futures.c.created).where(futures.c.lane == lane).order_by(futures.c.seq.desc()).limit(1)
    return connection.execute(query).scalar_one_or_none()


def newest_request(connection: Connection, lane: str, kinds: Sequence[str]) -> AnyRow | None:
    """(seq, kind) of the last request of those kinds in a lane, but for those that have come to nothing."""
    query = select(futures.c.seq, futures.c.kind).where(futures.c.lane == lane, futures.c.kind.in_(kinds))
    query = query.where(futures.c.state.not_in(("failed", "cancelled"))).order_by(futures.c.seq.desc()).limit(1)
    return connection.execute(query).one_or_none()


def ephemeral_samplers(connection: Connection) -> list[SamplerRecord]:
    """Samplers that have no name but the place where they were made, whoever owns them, newest first."""
    query = select(samplers).where(samplers.c.lane.is_not(None)).order_by(samplers.c.created.desc())
    return [SamplerRecord(**row) for row in connection.execute(query).mappings()]


def trace(connection: Connection, session_id: str) -> list[tuple[str, str, str, float, float]]:
    """(lane, kind, state, created, updated) of each future of a session's models and samplers, as they came."""
    models = select(training_models.c.id).where(training_models.c.session_id == session_id)
    of_session = models.union(select(samplers.c.id).where(samplers.c.session_id == session_id))
    columns = (futures.c.lane, futures.c.kind, futures.c.state, futures.c.created, futures.c.updated)
    query = select(*columns).where(futures.c.lane.in_(of_session)).order_by(futures.c.number)
    return [(row.lane, row.kind, row.state, row.created, row.updated) for row in connection.execute(query)]


def num_waiting(connection: Connection, kind: str) -> int:
    """Requests of a kind that could be worked on, if anybody had the time."""
    query = select(func.count()).select_from(futures).where(and_(futures.c.ready, futures.c.kind == kind))
    return int(connection.execute(query).scalar_one())


def unloaded_models(connection: Connection, before: float) -> Sequence[str]:
    """The ids of models that were given up by then."""
    return connection.execute(select(training_models.c.id).where(training_models.c.unloaded < before)).scalars().all()


def _count(connection: Connection, query: Select[*tuple[object, ...]]) -> int:
    return int(connection.execute(select(func.count()).select_from(query.subquery())).scalar_one())
