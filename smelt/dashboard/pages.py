"""The pages for people, and the files that they load; knows nothing of smelt: pages ask its REST like any client.

A page is a template without data; its script fetches what it shows. Nothing comes from another host, and no script
stands within a page, so that the policy can forbid both.
"""

import gzip
import hashlib
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse
from starlette.exceptions import HTTPException
from starlette.responses import Response

from smelt.dashboard.rendering import render

STATIC = Path(__file__).parent / "static"
TYPES = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
ONE_DAY = 24 * 3600
POLICY = "default-src 'self'; object-src 'none'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
# Plotly sets the style of what it draws within the page.
CHART_POLICY = f"{POLICY}; style-src 'self' 'unsafe-inline'; img-src 'self' data:"
INDEX = {"dashboard": "/dashboard", "docs": "/docs", "openapi": "/openapi.json", "openai": "/v1", "runs": "/v1/runs"}


@dataclass(frozen=True)
class StaticFile:
    """A file that pages load. Our own are asked for anew each time, which the ETag makes cheap."""

    body: bytes
    media_type: str
    max_age_s: int = 0

    @cached_property
    def etag(self) -> str:
        """A name for this content."""
        return f'"{hashlib.sha256(self.body).hexdigest()[:32]}"'

    @cached_property
    def compressed(self) -> bytes:
        """The content as gzip; made once, when somebody wants it."""
        return gzip.compress(self.body, compresslevel=6, mtime=0)

    def response(self, request: Request) -> Response:
        """The file, packed if the client can unpack it, or word that it has it already."""
        caching = f"public, max-age={self.max_age_s}" if self.max_age_s else "no-cache"
        headers = {"ETag": self.etag, "Cache-Control": caching, "Vary": "Accept-Encoding"}
        if self.etag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        if "gzip" not in request.headers.get("accept-encoding", ""):
            return Response(self.body, media_type=self.media_type, headers=headers)
        headers["Content-Encoding"] = "gzip"
        return Response(self.compressed, media_type=self.media_type, headers=headers)


def static_files() -> dict[str, StaticFile]:
    """Every file that pages may load, by name."""
    own = {path.name: StaticFile(path.read_bytes(), TYPES[path.suffix]) for path in sorted(STATIC.iterdir())}
    plotly = (files("plotly") / "package_data" / "plotly.min.js").read_bytes()
    return {**own, "plotly.js": StaticFile(plotly, TYPES[".js"], ONE_DAY)}


def router() -> APIRouter:
    """The routes of pages and their files."""
    routes = APIRouter(include_in_schema=False)
    known = static_files()

    @routes.get("/")
    async def index(request: Request) -> Response:
        """The dashboard for a browser, the places to go for a program."""
        if "text/html" in request.headers.get("accept", ""):
            return RedirectResponse("/dashboard")
        return JSONResponse(INDEX)

    _add_training(routes)

    @routes.get("/dashboard/playground")
    async def playground(request: Request) -> Response:
        """A model to write with."""
        return page(request, "playground.html")

    @routes.get("/dashboard/models")
    async def models(request: Request) -> Response:
        """The models, and who has loaded them."""
        return page(request, "models.html")

    # Not a coroutine: the first one to ask for a large file waits for it to be packed.
    @routes.get("/static/{name}")
    def static(request: Request, name: str) -> Response:
        """A file of a page."""
        if name not in known:
            raise HTTPException(404, f"there is no file {name!r}")
        return known[name].response(request)

    return routes


def _add_training(routes: APIRouter) -> None:
    """What is being trained, and was."""

    @routes.get("/dashboard")
    async def runs(request: Request) -> Response:
        """The list of runs."""
        return page(request, "runs.html")

    @routes.get("/dashboard/runs/{run_id}")
    async def run(request: Request, run_id: str) -> Response:
        """One run with its charts."""
        return page(request, "run.html", CHART_POLICY, run_id=run_id, section="Runs")

    @routes.get("/dashboard/datasets")
    async def datasets(request: Request) -> Response:
        """The datasets, and what is being made."""
        return page(request, "datasets.html")

    @routes.get("/dashboard/sessions")
    async def sessions(request: Request) -> Response:
        """The sessions of training by request."""
        return page(request, "sessions.html")

    @routes.get("/dashboard/sessions/{session_id}")
    async def session(request: Request, session_id: str) -> Response:
        """One session with the charts of its models."""
        return page(request, "session.html", CHART_POLICY, session_id=session_id, section="Sessions")


def page(request: Request, template: str, policy: str = POLICY, **values: object) -> HTMLResponse:
    """A page; one of a browser that has logged in knows the token that must come with its requests."""
    token = getattr(request.state, "csrf_token", "")
    return HTMLResponse(
        render(template, path=request.url.path, csrf_token=token, **values), headers={"Content-Security-Policy": policy}
    )
