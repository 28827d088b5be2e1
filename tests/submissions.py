"""Requests to a ledger, for tests of it."""

import asyncio
from typing import Any

from smelt.storage.futures import Ledger
from smelt.storage.transitions import Submission


def step(seq: int | None, lane: str | None = "lane", request: bytes = b"", **changes: Any) -> Submission:
    values = {"owner": "ann", "kind": "step", "fingerprint": "same", "request": request, "lane": lane, "seq": seq}
    return Submission(**(values | changes))


async def accept(ledger: Ledger, *seqs: int, lane: str = "lane") -> list[str]:
    return list(await asyncio.gather(*[ledger.accept(step(seq, lane)) for seq in seqs]))
