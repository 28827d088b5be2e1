"""Errors as HTTP: one table of statuses, and the body that each family of routes gives them; knows no route.

Whatever goes wrong inside says so in the log. The client gets the request id to look it up by, and no path, no SQL
and no traceback.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from smelt import errors
from smelt.api.families import Shape, shape_of

# An error has the status of the nearest class above it.
STATUSES: dict[type[BaseException], int] = {
    errors.InvalidInput: 400,
    errors.Unauthorized: 401,
    errors.Forbidden: 403,
    errors.NotFound: 404,
    errors.SlowBody: 408,
    errors.AlreadyExists: 409,
    errors.InUse: 409,
    errors.TooLarge: 413,
    errors.UnsupportedEncoding: 415,
    errors.WrongHost: 421,
    errors.SeqReused: 422,
    errors.SeqAbandoned: 422,
    errors.RateLimited: 429,
    errors.Overloaded: 429,
    errors.MissingDependency: 501,
    errors.Unavailable: 503,
    errors.TransportError: 503,
    errors.StorageError: 503,
    errors.OutOfSpace: 507,
    Exception: 500,
}

# What a client is told where the error's own words may name what is only the operator's to know.
UNSAID: dict[int, str] = {
    500: "something went wrong inside the server",
    501: "this server lacks an optional package for that",
    503: "the server cannot reach a part of itself at the moment",
    507: "the server's disk is full; nothing was changed",
}

# status -> OpenAI's `type` and `code`
OPENAI_NAMES: dict[int, tuple[str, str | None]] = {
    401: ("authentication_error", "invalid_api_key"),
    403: ("permission_error", "forbidden"),
    404: ("invalid_request_error", "not_found"),
    405: ("invalid_request_error", "method_not_allowed"),
    408: ("invalid_request_error", "request_timeout"),
    413: ("invalid_request_error", "request_too_large"),
    429: ("rate_limit_error", "rate_limit_exceeded"),
    500: ("server_error", "internal_error"),
    501: ("server_error", "not_installed"),
    503: ("server_error", "unavailable"),
    507: ("server_error", "disk_full"),
}

# What OpenAI has a `code` of its own for, whatever its status.
OPENAI_CODES: dict[type[BaseException], str] = {
    errors.Banned: "banned",
    errors.BannedPrompt: "banned_prompt",
    errors.Overloaded: "overloaded",
    errors.SeqReused: "idempotency_key_reused",
    errors.UnknownModel: "model_not_found",
}


def status_of(error: BaseException) -> int:
    """The HTTP status of an error."""
    return next(STATUSES[kind] for kind in type(error).__mro__ if kind in STATUSES)


def message_of(error: BaseException, request_id: str = "") -> str:
    """What the client is told."""
    status = status_of(error)
    if status in UNSAID and not isinstance(error, errors.Unavailable):
        return f"{UNSAID[status]} (request {request_id})" if request_id else UNSAID[status]
    return str(error)


def headers_of(error: BaseException) -> dict[str, str]:
    """The headers that belong to an error: when to try again, how to say who one is."""
    status = status_of(error)
    if status == 401:
        return {"www-authenticate": 'Bearer realm="smelt"'}
    if isinstance(error, errors.SeqReused | errors.SeqAbandoned):
        return {"x-should-retry": "false"}
    if status in (429, 503):
        seconds = error.retry_after_s if isinstance(error, errors.Unavailable) else 1
        return {"retry-after": str(max(1, math.ceil(seconds)))}
    return {}


def openai_body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """An error as OpenAI's clients expect it."""
    kind, usual_code = OPENAI_NAMES.get(status, ("invalid_request_error", None))
    return {"error": {"message": message, "type": kind, "param": param, "code": code or usual_code}}


def openai_error(error: BaseException, request_id: str = "") -> dict[str, Any]:
    """An error of ours in OpenAI's shape."""
    status, message = status_of(error), message_of(error, request_id)
    return openai_body(status, message, getattr(error, "param", None), OPENAI_CODES.get(type(error)))


def detail_error(error: BaseException, request_id: str = "") -> dict[str, Any]:
    """An error of ours in FastAPI's shape."""
    return {"detail": message_of(error, request_id)}


def success_error(error: BaseException, request_id: str = "") -> dict[str, Any]:
    """An error of ours in the shape of what lies below /api."""
    return {"success": False, "error": message_of(error, request_id)}


def status_code_error(error: BaseException, request_id: str = "") -> dict[str, Any]:
    """An error of ours in the shape of /completions."""
    return {"Status Code": status_of(error), "Error": message_of(error, request_id)}


BODIES: dict[Shape, Callable[[BaseException, str], dict[str, Any]]] = {
    "openai": openai_error,
    "detail": detail_error,
    "success": success_error,
    "status_code": status_code_error,
}


def response_to(error: BaseException, shape: Shape, request_id: str = "") -> Response:
    """The whole answer to an error."""
    return _json_response(status_of(error), BODIES[shape](error, request_id), headers_of(error))


def install(app: FastAPI) -> None:
    """Have the application answer errors so."""
    app.add_exception_handler(RequestValidationError, _answer_invalid)
    app.add_exception_handler(HTTPException, _answer_http)
    app.add_exception_handler(errors.SmeltError, _answer)
    app.add_exception_handler(Exception, _answer)


async def _answer(request: Request, error: Exception) -> Response:
    return response_to(error, shape_of(request.url.path), request.scope["state"].get("request_id", ""))


async def _answer_invalid(request: Request, error: Exception) -> Response:
    """What pydantic found: all faults in FastAPI's shape, the first one by name elsewhere."""
    assert isinstance(error, RequestValidationError)
    faults = error.errors()
    shape = shape_of(request.url.path)
    if shape == "detail":
        # What was sent is left out: it may be long, or secret.
        detail = [{name: fault[name] for name in ("type", "loc", "msg")} for fault in faults]
        return _json_response(422, {"detail": detail})
    param = _place(faults[0])
    message = f"{param}: {faults[0]['msg']}" if param else str(faults[0]["msg"])
    return response_to(errors.InvalidInput(message, param), shape)


async def _answer_http(request: Request, error: Exception) -> Response:
    """What the router or a handler says with a status of its own: 404, 405."""
    assert isinstance(error, HTTPException)
    if error.status_code in (204, 304):
        return Response(status_code=error.status_code, headers=error.headers)
    bodies = {
        "openai": openai_body(error.status_code, str(error.detail)),
        "detail": {"detail": error.detail},
        "success": {"success": False, "error": str(error.detail)},
        "status_code": {"Status Code": error.status_code, "Error": str(error.detail)},
    }
    return _json_response(error.status_code, bodies[shape_of(request.url.path)], error.headers)


def _place(fault: Mapping[str, Any]) -> str | None:
    """The parameter that a fault is about, such as messages.0.role."""
    place = [str(part) for part in fault["loc"] if part not in ("body", "query", "path")]
    if fault["type"] == "json_invalid" or not place:
        return None
    return ".".join(place)


def _json_response(status: int, body: dict[str, Any], headers: Mapping[str, str] | None = None) -> Response:
    return JSONResponse(body, status, headers)
