"""Strikes and bans in both databases: who is banned when, by whom, and how it is forgiven."""

import pytest
from sqlalchemy import Connection, Engine

from smelt.control import bans
from smelt.control.bans import Limits, Standing, Subject
from smelt.control.keys import create_key
from smelt.errors import AlreadyExists, InvalidInput, NotFound
from smelt.storage import records
from smelt.storage.records import Ban, Key, Strike

LIMITS = Limits(strikes=3, key_strikes=7)


@pytest.fixture
def connection(engine: Engine) -> Connection:
    with engine.begin() as connection:
        for owner, name in (("ann", "laptop"), ("bob", "phone")):
            create_key(connection, name, owner)
        yield connection


def subject(connection: Connection, name: str, user: str = "") -> Subject:
    key = next(key for key in records.all_keys(connection) if key.name == name)
    return Subject(key.owner, key.id, user)


def strike(connection: Connection, name: str, user: str = "", times: int = 1) -> None:
    for _ in range(times):
        bans.add_strike(connection, subject(connection, name, user), "spam", LIMITS)


def banned(connection: Connection) -> set[tuple[str, str | None]]:
    return {(found.key, found.user) for found in bans.standings(connection) if found.reason is not None}


def test_a_user_is_banned_below_the_key_that_names_it(connection: Connection) -> None:
    strike(connection, "laptop", "eve", times=2)
    assert banned(connection) == set()
    strike(connection, "phone", "eve")
    assert banned(connection) == set()
    strike(connection, "laptop", "eve")
    assert banned(connection) == {("laptop", "eve")}
    (standing,) = [found for found in bans.standings(connection) if found.reason]
    assert standing.num_strikes == 3
    assert standing.reason == "3 broken rules, the last one 'spam'"
    strike(connection, "laptop", "eve")
    assert banned(connection) == {("laptop", "eve")}


def test_a_key_that_names_nobody_is_banned_itself(connection: Connection) -> None:
    strike(connection, "laptop", times=3)
    assert banned(connection) == {("laptop", None)}


def test_a_key_that_names_many_collects_the_strikes_of_all(connection: Connection) -> None:
    for number in range(6):
        strike(connection, "laptop", f"user {number}")
    assert banned(connection) == set()
    strike(connection, "laptop", "one more")
    assert banned(connection) == {("laptop", None)}


def test_whoever_needs_no_key_is_banned_by_user(connection: Connection) -> None:
    for _ in range(3):
        bans.add_strike(connection, Subject(user="eve"), "spam", LIMITS)
    assert banned(connection) == {("local", "eve")}
    bans.forgive(connection, "local", user="eve")
    assert bans.standings(connection) == []


def test_bans_are_made_and_lifted_by_hand(connection: Connection) -> None:
    bans.ban_by_hand(connection, "laptop", "ann", reason="sold")
    bans.ban_by_hand(connection, "laptop", "ann", "eve")
    found = {found.user: found for found in bans.standings(connection)}
    assert found[None] == Standing(found[None].id, "laptop", "ann", None, 0, found[None].since, "sold")
    assert found["eve"].reason == "by the administrator"
    with pytest.raises(AlreadyExists, match="the key 'laptop' is banned already"):
        bans.ban_by_hand(connection, "laptop", "ann")
    assert found["eve"].id is not None
    bans.lift(connection, found["eve"].id)
    bans.forgive(connection, "laptop", "ann")
    assert bans.standings(connection) == []
    with pytest.raises(NotFound):
        bans.lift(connection, found["eve"].id)


def test_a_key_is_forgiven_with_the_strikes_of_its_users_and_no_other_key(connection: Connection) -> None:
    strike(connection, "laptop", "eve", times=3)
    strike(connection, "laptop", "mallory", times=4)
    strike(connection, "phone", times=1)
    assert banned(connection) == {("laptop", None), ("laptop", "eve"), ("laptop", "mallory")}
    bans.forgive(connection, "laptop", "ann", "eve")
    assert banned(connection) == {("laptop", None), ("laptop", "mallory")}
    bans.forgive(connection, "laptop", "ann")
    assert banned(connection) == {("laptop", "mallory")}
    assert [found.rule for found in records.of_all_owners(connection, Strike)] == ["spam"]
    strike(connection, "laptop", "somebody")
    assert banned(connection) == {("laptop", "mallory")}


def test_a_key_that_is_gone_can_be_forgiven_by_its_id(connection: Connection) -> None:
    strike(connection, "laptop", times=3)
    key_id = subject(connection, "laptop").key_id
    records.delete(connection, Key, "ann", key_id)
    assert banned(connection) == {(key_id, None)}
    bans.forgive(connection, key_id, "ann")
    assert records.of_all_owners(connection, Ban) == []


def test_mistakes_are_named(connection: Connection) -> None:
    with pytest.raises(NotFound, match="'ann' has no key 'phone'; there are: laptop"):
        bans.ban_by_hand(connection, "phone", "ann")
    with pytest.raises(NotFound, match="the user 'eve' of the key 'laptop' has no strikes"):
        bans.forgive(connection, "laptop", "ann", "eve")
    with pytest.raises(InvalidInput, match="a reason has at most 512 printable"):
        bans.ban_by_hand(connection, "laptop", "ann", reason="a\nb")
