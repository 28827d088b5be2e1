"""What Tinker's clients ask of an account: its key, its use, its records; nothing here costs anything."""

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request

from smelt.api.services import Services
from smelt.api.tinker_answers import owner_of
from smelt.control.keys import key_of, revoke_key
from smelt.errors import NotFound
from smelt.storage.records import Key

MAX_COUNTED = 100_000
GIGABYTE = 1e9


def add_routes(routes: APIRouter, services: Services) -> None:
    """The routes of accounts."""

    @routes.get("/auth/apikey/me")
    def show_key(request: Request) -> dict[str, Any]:
        """The key that this request carries."""
        key = _key(request, services)
        return {
            "key_id": int(key.id[:12], 16),
            "name": key.name,
            "note": "",
            "details": {"org_details": {"name": "smelt"}, "user_details": {"email": key.owner}},
        }

    @routes.delete("/auth/apikey/me", status_code=204)
    def remove_key(request: Request) -> None:
        """Revoke the key that this request carries."""
        key = _key(request, services)
        services.writer.write(lambda connection: revoke_key(connection, key.name, key.owner)).result()

    @routes.get("/billing/usage/events")
    async def show_usage() -> dict[str, Any]:
        """What has to be paid: nothing."""
        return {"data": [], "sessions": {}}

    @routes.get("/billing/usage/checkpoints/current")
    async def show_storage(request: Request) -> dict[str, Any]:
        """How much the caller's checkpoints take."""
        weights, owner = services.post_training.weights, owner_of(request)
        found, count = await weights.page(MAX_COUNTED, 0, owner=owner)
        num_bytes = sum([await weights.size(each) or 0 for each in found])
        item = {"checkpoint_count": count, "size_bytes": num_bytes, "size_gigabytes": num_bytes / GIGABYTE}
        return {"data": [{"user_name": owner, **item}] if count else []}

    @routes.get("/audit")
    async def show_audit() -> None:
        """There is none."""
        raise NotFound("this server keeps no audit log; its own log has every request")


def _key(request: Request, services: Services) -> Key:
    """The caller's key. NotFound where nobody needs one."""
    key_id = request.state.caller.key_id
    if key_id is None:
        raise NotFound("this server needs no API key, and this request is by none")
    with services.database.connect() as connection:
        return key_of(connection, owner_of(request), key_id)
