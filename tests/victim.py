"""A process that the crash tests kill: works with the ledger and prints each promise once it was made.

python victim.py URL BODIES FAULT: FAULT is POINT:NTH, or - for none. Every lane is worked on at the same time.
"""

import asyncio
import os
import sys
from pathlib import Path

from smelt.storage.database import open_database
from smelt.storage.faults import fault_from
from smelt.storage.files import Files
from smelt.storage.futures import MAX_INLINE, Ledger
from smelt.storage.transitions import Submission
from smelt.storage.writer import Writer

NUM_LANES = 4
NUM_SEQS = 12


def submission(lane: int, seq: int) -> Submission:
    text = f"request {lane}-{seq} ".encode()
    body = text * (MAX_INLINE // len(text) + 1) if seq % 4 == 0 else text
    return Submission("ann", "step", f"{lane}-{seq}", body, lane=f"lane {lane}", seq=seq)


def say(*words: str) -> None:
    os.write(1, (" ".join(words) + "\n").encode())


async def ask(ledger: Ledger, lane: int) -> None:
    for seq in range(1, NUM_SEQS + 1):
        say("accepted", await ledger.accept(submission(lane, seq)))


async def work(ledger: Ledger) -> None:
    epoch = await ledger.open_epoch()
    num_done = 0
    while num_done < NUM_LANES * NUM_SEQS:
        for granted in await ledger.next_grants(epoch, 8, ("step",)):
            await ledger.finish(granted.id, epoch, granted.request[::-1])
            say("finished", granted.id)
            num_done += 1


async def everything(ledger: Ledger) -> None:
    await asyncio.gather(work(ledger), *[ask(ledger, lane) for lane in range(NUM_LANES)])


async def one_at_a_time(ledger: Ledger) -> None:
    """For the trace of system calls: what is waited for between two words."""
    epoch = await ledger.open_epoch()
    for seq in range(1, 6):
        say("asking")
        await ledger.accept(submission(0, seq))
        say("answered")
        [granted] = await ledger.next_grants(epoch, 1, ("step",))
        say("granted")
        await ledger.finish(granted.id, epoch, b"result")
        say("kept")


def main(url: str, bodies: str, spec: str) -> None:
    fault = fault_from(None if spec in ("-", "slowly") else spec)
    engine = open_database(url)
    writer = Writer(engine)
    ledger = Ledger(engine, writer, Files(Path(bodies), fault), fault)
    say("ready")
    asyncio.run(one_at_a_time(ledger) if spec == "slowly" else everything(ledger))
    writer.close()
    say("end")


if __name__ == "__main__":
    main(*sys.argv[1:])
