"""API keys: shown once and never kept, revoked at once, asked for before a server shows itself to others."""

import asyncio
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from sqlalchemy import Engine

from smelt.control import keyring, keys
from smelt.control.keyring import KeyRing
from smelt.control.keys import Caller
from smelt.errors import AlreadyExists, ConfigError, InvalidInput, NotFound
from smelt.settings import Settings, load_settings
from smelt.storage import records
from smelt.storage.database import open_database


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Ring:
    """A ring, and the database it reads."""

    engine: Engine
    clock: Clock = field(default_factory=Clock)

    def __post_init__(self) -> None:
        self.ring = KeyRing(self.engine, self.clock)

    def owner_of(self, text: str) -> str | None:
        if self.ring.is_stale:
            asyncio.run(self.ring.refresh())
        caller = self.ring.caller_with(text.encode())
        return caller.owner if caller else None


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return load_settings(home=tmp_path)


@pytest.fixture
def engine(settings: Settings) -> Iterator[Engine]:
    engine = open_database(settings.database_url)
    yield engine
    engine.dispose()


def create(engine: Engine, name: str, **options: object) -> str:
    with engine.begin() as connection:
        return keys.create_key(connection, name, **options)


def revoke(engine: Engine, name: str, owner: str = "local") -> None:
    with engine.begin() as connection:
        keys.revoke_key(connection, name, owner)


def test_a_keys_text_is_nowhere_but_with_its_owner(engine: Engine, tmp_path: Path) -> None:
    texts = [create(engine, name) for name in ("a", "b")]
    assert len(set(texts)) == 2
    assert all(text.startswith("tml-") and len(text) == 47 and text.isascii() for text in texts)
    kept = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert not [text for text in texts if text.encode() in kept or text[4:].encode() in kept]


def test_a_key_knows_its_owner_scopes_and_limits(engine: Engine) -> None:
    ring = KeyRing(engine)
    text = create(engine, "a", owner="ann", scopes=["inference"], requests_per_minute=5, max_concurrent=2)
    admin = create(engine, "b", scopes=["admin"])
    asyncio.run(ring.refresh())
    caller = ring.caller_with(text.encode())
    assert caller is not None
    assert caller.key_id
    assert caller == Caller("ann", caller.key_id, frozenset({"inference"}), 5, 2)
    assert ring.caller_of(caller.key_id) == caller
    everything = ring.caller_with(admin.encode())
    assert everything is not None
    assert everything.scopes == set(keys.SCOPES)


@pytest.mark.parametrize("text", [b"", b"tml-", b"tml-" + b"A" * 43, b"\xff" * 99])
def test_what_is_no_key_opens_nothing(engine: Engine, text: bytes) -> None:
    create(engine, "a")
    ring = KeyRing(engine)
    asyncio.run(ring.refresh())
    assert ring.caller_with(text) is None


def test_a_running_server_learns_of_changes_within_a_second(engine: Engine) -> None:
    ring = Ring(engine)
    assert ring.owner_of("tml-none") is None
    assert not ring.ring.any_made
    text = create(engine, "a", owner="ann")
    assert ring.owner_of(text) is None
    ring.clock.now += keyring.MAX_AGE_S
    assert keyring.MAX_AGE_S < 1
    assert ring.owner_of(text) == "ann"
    revoke(engine, "a", "ann")
    assert ring.owner_of(text) == "ann"
    ring.clock.now += keyring.MAX_AGE_S
    assert ring.owner_of(text) is None
    assert ring.ring.any_made


def test_whoever_asks_at_once_waits_for_one_reading(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    readings = []

    def read_slowly(connection: object) -> list[records.Key]:
        readings.append(time.sleep(0.05))
        return []

    monkeypatch.setattr(records, "all_keys", read_slowly)
    ring = KeyRing(engine)

    async def crowd() -> None:
        await asyncio.gather(*(ring.refresh() for _ in range(20)))

    asyncio.run(crowd())
    assert len(readings) == 1


def test_names_are_an_owners_own_and_free_again_when_removed(engine: Engine) -> None:
    create(engine, "a")
    create(engine, "a", owner="ann")
    with pytest.raises(AlreadyExists, match="'a' already exists in keys"):
        create(engine, "a")
    with engine.begin() as connection, pytest.raises(InvalidInput, match="smelt keys revoke a"):
        keys.remove_key(connection, "a")
    revoke(engine, "a")
    revoke(engine, "a")
    with engine.begin() as connection:
        keys.remove_key(connection, "a")
        assert [key.owner for key in records.all_keys(connection)] == ["ann"]
        assert records.all_keys(connection)[0].revoked is None
    create(engine, "a")


def test_mistakes_are_named(engine: Engine) -> None:
    create(engine, "a")
    with pytest.raises(NotFound, match="'local' has no key 'b'; there are: a"):
        revoke(engine, "b")
    with pytest.raises(InvalidInput, match="unknown scope 'everything'; a key may have: inference, training, admin"):
        create(engine, "b", scopes=["inference", "everything"])
    with pytest.raises(InvalidInput, match="needs a scope"):
        create(engine, "b", scopes=[])
    for name in ("", " ", "a\nb", "x" * 101):
        with pytest.raises(InvalidInput, match="printable"):
            create(engine, name)


def test_a_server_for_others_needs_a_key_that_opens_something(tmp_path: Path) -> None:
    exposed = load_settings(home=tmp_path / "new", host="0.0.0.0")
    for host in ("127.0.0.1", "localhost", "::1", "127.0.0.2"):
        keys.check_exposed(exposed.model_copy(update={"host": host}))
    assert not exposed.home.exists()
    with pytest.raises(ConfigError, match="smelt keys create NAME"):
        keys.check_exposed(exposed)
    engine = open_database(exposed.database_url)
    create(engine, "a")
    keys.check_exposed(exposed)
    keys.check_exposed(exposed.model_copy(update={"host": "box.example"}))
    revoke(engine, "a")
    engine.dispose()
    with pytest.raises(ConfigError, match=r"0\.0\.0\.0 can be reached"):
        keys.check_exposed(exposed)
