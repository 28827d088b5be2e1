"""Sessions as people look at them: their models in training, how far those are, what waits; and changes as they come.

Whoever follows is told of what has changed once a second. Knows no HTTP.
"""

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from sqlalchemy import Engine

from smelt.control.post_training import PostTraining
from smelt.control.session_figures import Step
from smelt.control.sessions import Standing, ask
from smelt.storage import session_rows
from smelt.storage.records import Session, TrainingModel

LOOK_SECONDS = 1.0
MAX_LISTED = 100
MAX_POINTS = 2000  # of a curve; more than a screen has columns
SPARK_POINTS = 60


@dataclass(frozen=True, slots=True)
class ModelView:
    """A model in training and its last step. `num_waiting`: requests of it that are not finished."""

    id: str
    base_model: str
    rank: int  # 0: all of the model is trained
    created: float
    is_open: bool
    num_waiting: int
    step: int
    last: Step | None
    spark: list[float]  # its losses, so few that they fit into a line


@dataclass(frozen=True, slots=True)
class SessionView:
    """A session as it stands."""

    id: str
    name: str
    created: float
    standing: Standing
    num_waiting: int  # samples included
    num_samplers: int
    models: list[ModelView]
    tags: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class SessionChange:
    """Something new: "sessions" has those SessionViews that have changed, "session" one of them.

    "curves" has all steps of each model, thinned, and "steps" those that were added.
    """

    kind: str
    data: Any
    cursor: str = ""


class SessionViews:
    """Of every owner."""

    def __init__(self, training: PostTraining, database: Engine) -> None:
        self._training = training
        self._database = database

    async def all(self, owner: str) -> list[SessionView]:
        """The owner's last sessions, newest first."""
        return [await self._view(session) for session in await self._training.sessions.page(owner, MAX_LISTED, 0)]

    async def one(self, owner: str, session_id: str) -> SessionView:
        """One of them. NotFound."""
        return await self._view(await self._training.sessions.read(owner, session_id))

    async def curves(self, owner: str, session_id: str) -> dict[str, list[Step]]:
        """model id -> its steps, thinned to what a screen can show. NotFound."""
        await self._training.sessions.read(owner, session_id)
        models, _ = await self._training.sessions.parts(owner, session_id)
        return {model.id: thinned((await self._steps(model.id))[0]) for model in models}

    async def follow_all(self, owner: str) -> AsyncGenerator[SessionChange | None, None]:
        """All sessions, then those that change; None where none has."""
        known: dict[str, SessionView] | None = None
        async for _ in _moments():
            views = await self.all(owner)
            changed = [view for view in views if known is None or known.get(view.id) != view]
            yield SessionChange("sessions", changed) if changed or known is None else None
            known = {view.id: view for view in views}

    async def follow(self, owner: str, session_id: str) -> AsyncGenerator[SessionChange | None, None]:
        """A session and its curves, then what is added."""
        known: SessionView | None = None
        sent: dict[str, tuple[int, int]] = {}  # model id -> how many steps of which reading
        async for _ in _moments():
            view = await self.one(owner, session_id)
            if view != known:
                known = view
                yield SessionChange("session", view)
            steps = {model.id: await self._steps(model.id) for model in view.models}
            if any(sent.get(name, (0, 0))[1] != num_readings for name, (_, num_readings) in steps.items()):
                yield SessionChange("curves", {name: thinned(found) for name, (found, _) in steps.items()})
            else:
                added = {name: found[sent[name][0] :] for name, (found, _) in steps.items()}
                yield SessionChange("steps", added) if any(added.values()) else None
            sent = {name: (len(found), num_readings) for name, (found, num_readings) in steps.items()}

    async def _steps(self, model_id: str) -> tuple[list[Step], int]:
        return await asyncio.to_thread(self._training.figures.steps, model_id)

    async def _view(self, session: Session) -> SessionView:
        models, samplers = await self._training.sessions.parts(session.owner, session.id)
        waiting = await asyncio.to_thread(
            ask, self._database, partial(session_rows.num_unfinished, session_id=session.id)
        )
        return SessionView(
            id=session.id,
            name=session.display_name or session.id,
            created=session.created,
            standing=self._training.sessions.standing(session),
            num_waiting=sum(waiting.values()),
            num_samplers=len(samplers),
            models=[_model_view(model, (await self._steps(model.id))[0], waiting.get(model.id, 0)) for model in models],
            tags=session.tags,
        )


def _model_view(model: TrainingModel, steps: list[Step], num_waiting: int) -> ModelView:
    losses = [step.loss for step in steps if step.loss is not None]
    return ModelView(
        id=model.id,
        base_model=model.base_model,
        rank=model.rank,
        created=model.created,
        is_open=model.unloaded is None,
        num_waiting=num_waiting,
        step=steps[-1].step if steps else 0,
        last=steps[-1] if steps else None,
        spark=losses[:: 1 + len(losses) // SPARK_POINTS],
    )


def thinned(steps: list[Step]) -> list[Step]:
    """As many as a screen has columns, the last one among them."""
    stride = 1 + len(steps) // MAX_POINTS
    return steps[(len(steps) - 1) % stride :: stride] if steps else []


async def _moments() -> AsyncGenerator[None, None]:
    """Now, and once a second from now on."""
    while True:
        yield
        await asyncio.sleep(LOOK_SECONDS)
