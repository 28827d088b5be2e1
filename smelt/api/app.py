"""The HTTP application: every router behind the gate; knows no route's work and no process.

Made anew for each process and each test: what the routes stand on comes in as `Services`.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.types import ASGIApp

from smelt import __version__
from smelt.api import (
    bans,
    chat_training,
    classification,
    completions_by_query,
    datasets,
    docs,
    failures,
    health,
    loaded_model,
    login,
    models,
    openai,
    openai_batches,
    openai_files,
    openai_fine_tuning,
    openai_uploads,
    resources,
    text_generation,
    tinker,
    tinker_completions,
    training_form,
    training_sessions,
)
from smelt.api.gate import Gate
from smelt.api.services import Services
from smelt.api.sessions import Sessions
from smelt.api.shortcuts import Shortcuts
from smelt.control.dataset_requests import DatasetRequests
from smelt.control.imports import Imports
from smelt.control.keyring import KeyRing
from smelt.dashboard import pages


def create_app(services: Services) -> ASGIApp:
    """The application that a server runs. ConfigError for settings that cannot be meant."""
    ring = KeyRing(services.database)
    sessions = Sessions(services.settings.home)
    app = Shortcuts(create_routes(services, ring, sessions))
    return Gate(app, services.settings, ring, sessions)


def create_routes(services: Services, ring: KeyRing, sessions: Sessions) -> FastAPI:
    """The routes without the gate; nobody serves these."""
    imports = Imports(services.settings, services.ledger)
    dataset_requests = DatasetRequests(services.settings, services.ledger, services.uploads)

    @asynccontextmanager
    async def working(_app: FastAPI) -> AsyncIterator[None]:
        batches = services.batches.running(openai_batches.answering(services))
        async with imports.running(), dataset_requests.running(), batches, services.fine_tuning.running():
            yield

    # FastAPI's own pages load their scripts from somebody else's server.
    app = FastAPI(title="smelt", version=__version__, docs_url=None, redoc_url=None, lifespan=working)
    failures.install(app)
    for routes in (
        openai.router(services),
        openai_files.router(services),
        openai_uploads.router(services),
        openai_batches.router(services),
        openai_fine_tuning.router(services.fine_tuning),
        tinker.router(services),
        tinker_completions.router(services),
        chat_training.router(services),
        completions_by_query.router(services),
        text_generation.router(services),
        classification.router(services),
        models.router(services, imports),
        loaded_model.router(services, imports),
        resources.router(services),
        training_form.router(services, dataset_requests),
        training_sessions.router(services),
        datasets.router(services, dataset_requests),
        bans.router(services),
        health.router(services),
        pages.router(),
        docs.router(app),
        login.router(ring, sessions),
    ):
        app.include_router(routes)
    return app
