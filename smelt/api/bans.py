"""Bans over HTTP, for administrators: who is banned or has strikes, banned by hand, forgiven; knows no rule."""

import asyncio
from dataclasses import dataclass
from typing import Annotated

from fastapi import APIRouter, Body, status

from smelt.api.services import Services
from smelt.control import bans
from smelt.control.bans import BY_HAND, MAX_CHARS, Standing
from smelt.types import LOCAL_OWNER

Name = Annotated[str, Body(embed=True, max_length=MAX_CHARS)]


@dataclass(frozen=True, slots=True)
class Standings:
    """Everybody with a ban or a strike: those who are banned first."""

    data: list[Standing]


def router(services: Services) -> APIRouter:
    """The routes below /v1/bans."""
    routes = APIRouter(prefix="/v1/bans", tags=["bans"])
    database, writer = services.database, services.writer

    def read() -> Standings:
        with database.connect() as connection:
            return Standings(bans.standings(connection))

    @routes.get("")
    def list_bans() -> Standings:
        """Who is banned and why, and who has strikes. A `user` of null means the key itself."""
        return read()

    @routes.post("", status_code=status.HTTP_201_CREATED)
    async def ban(key: Name, owner: Name = LOCAL_OWNER, user: Name = "", reason: Name = BY_HAND) -> Standings:
        """Ban a key by its name ("local" where nobody needs one), or one of its users; all standings after that."""
        await asyncio.wrap_future(writer.write(lambda on: bans.ban_by_hand(on, key, owner, user, reason)))
        return await asyncio.to_thread(read)

    @routes.delete("/{ban_id}", status_code=status.HTTP_204_NO_CONTENT)
    async def lift_ban(ban_id: str) -> None:
        """Forgive whom a ban is about, strikes and all."""
        await asyncio.wrap_future(writer.write(lambda on: bans.lift(on, ban_id)))

    return routes
