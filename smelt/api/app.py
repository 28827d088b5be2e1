"""The HTTP application: every router behind the gate; knows no route's work and no process.

Made anew for each process and each test: what the routes stand on comes in as `Services`.
"""

from fastapi import FastAPI
from starlette.types import ASGIApp

from smelt import __version__
from smelt.api import failures, health
from smelt.api.gate import Gate
from smelt.api.services import Services


def create_app(services: Services) -> ASGIApp:
    """The application that a server runs."""
    return Gate(create_routes(services), services)


def create_routes(services: Services) -> FastAPI:
    """The routes without the gate; nobody serves these."""
    # FastAPI's own pages load their scripts from somebody else's server.
    app = FastAPI(title="smelt", version=__version__, docs_url=None, redoc_url=None)
    app.state.services = services
    failures.install(app)
    app.include_router(health.router(services))
    return app
