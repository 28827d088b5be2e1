"""The course of one batch: its input is checked, its requests go into the ledger, what came of them into files.

Knows no HTTP, and does not answer requests. Each step may be cut short by a crash and is then done again from its
beginning, which changes nothing that it had done.
"""

import asyncio
import hashlib
import logging
import shutil
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, Any

import msgspec

from smelt.control.batch_files import (
    Input,
    InputLine,
    LineError,
    Outcome,
    examine,
    numbered,
    output_line,
    unanswered_line,
)
from smelt.control.batch_lines import KIND, BatchLines, Line
from smelt.control.uploads import Uploads
from smelt.errors import OutOfSpace, StorageError
from smelt.storage import batch_rows
from smelt.storage.batch_rows import OVER
from smelt.storage.futures import Future, Ledger
from smelt.storage.records import BatchJob, Upload
from smelt.storage.transitions import FINISHED, Submission
from smelt.storage.writer import Writer

INPUT, OUTPUT, ERRORS = "input.jsonl", "output.jsonl", "errors.jsonl"
MAX_AHEAD = 64  # requests in the ledger that have no answer yet: what is behind them stays in the input
FEED_LINES = 16  # that are read and accepted together
READ_ROWS = 64
RETRY_SECONDS = 1.0
OUTPUT_SECONDS = 30 * 86400.0  # that what came of a batch is kept, unless its sender says otherwise

log = logging.getLogger(__name__)


class _Details(msgspec.Struct):
    cached_tokens: int = 0


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _Details = msgspec.field(default_factory=_Details)


class _Answer(msgspec.Struct):
    usage: _Usage | None = None


@dataclass(slots=True)
class Tally:
    """What the answers of a batch come to. Nobody counts what a cancelled one left unanswered."""

    num_completed: int = 0
    num_failed: int = 0
    num_unanswered: int = 0
    num_prompt: int = 0
    num_cached: int = 0
    num_output: int = 0

    def usage(self) -> dict[str, Any]:
        """The tokens, in the words of OpenAI's batches."""
        return {
            "input_tokens": self.num_prompt,
            "input_tokens_details": {"cached_tokens": self.num_cached},
            "output_tokens": self.num_output,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": self.num_prompt + self.num_output,
        }


@dataclass(frozen=True, slots=True)
class Desk:
    """What the courses of all batches stand on. `folder`: one folder per batch that is not over."""

    folder: Path
    writer: Writer
    ledger: Ledger
    uploads: Uploads
    lines: BatchLines


class Course:
    """`run` it until the batch is over. `num_completed` and `num_failed` are up to date meanwhile."""

    def __init__(self, batch: BatchJob, desk: Desk) -> None:
        self.num_completed = batch.num_completed
        self.num_failed = batch.num_failed
        self._batch = batch
        self._desk = desk
        self._folder = desk.folder / batch.id
        self._unfinished: set[int] = set()
        self._has_changed = asyncio.Event()
        self._is_cancelled = asyncio.Event()

    def note_ended(self, seq: int, failed: bool) -> None:
        """One of its requests has its answer."""
        self._unfinished.discard(seq)
        self.num_failed += failed
        self.num_completed += not failed
        self._has_changed.set()

    def cancel(self) -> None:
        """Its row says so already."""
        self._is_cancelled.set()

    async def run(self) -> None:
        """See it through, whatever the disk says in between. A bug of ours ends it as failed."""
        steps = {
            "validating": self._validate,
            "in_progress": self._answer,
            "finalizing": self._finish,
            "cancelling": self._finish,
        }
        while self._batch.status not in OVER:
            try:
                self._batch = await steps[self._batch.status]()
            except (OutOfSpace, StorageError) as error:
                log.error("batch %s has to wait: %s", self._batch.id, error)  # noqa: TRY400 - no bug of ours
                await asyncio.sleep(RETRY_SECONDS)
            except Exception:
                log.exception("batch %s failed", self._batch.id)
                bug = LineError("internal_error", "something went wrong inside the server; its log says more")
                self._batch = await self._move(status="failed", errors=[msgspec.to_builtins(bug)])
        await remove(self._batch.id, self._desk)

    async def _move(self, **changes: Any) -> BatchJob:
        """The row as it is afterwards: who cancels it meanwhile is not written over."""
        batch = self._batch
        move = partial(
            batch_rows.move,
            owner=batch.owner,
            batch_id=batch.id,
            expected=[batch.status],
            now=time.time(),
            **changes,
        )
        return await asyncio.wrap_future(self._desk.writer.write(move))

    async def _validate(self) -> BatchJob:
        found: Input = await asyncio.to_thread(examine, self._folder / INPUT, self._batch.endpoint)
        if found.errors:
            return await self._move(status="failed", errors=[msgspec.to_builtins(error) for error in found.errors])
        return await self._move(status="in_progress", num_requests=found.num_requests, model=found.model)

    async def _answer(self) -> BatchJob:
        """Until every request has its answer, the time is over, or nobody wants it any more."""
        feeding = asyncio.create_task(self._feed())
        stopping = asyncio.create_task(self._is_cancelled.wait())
        try:
            left = max(0.0, self._batch.deadline - time.time())
            await asyncio.wait({feeding, stopping}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            if feeding.done():
                feeding.result()
        finally:
            feeding.cancel()
            stopping.cancel()
            await asyncio.wait({feeding, stopping})
        return await self._move(status="finalizing")

    async def _feed(self) -> None:
        """Have a few of the requests in the ledger at any time, until all were there and are answered."""
        known = await self._desk.ledger.states(self._batch.id)
        accepted = {seq for seq, _, _ in known}
        self._unfinished = {seq for seq, _, state in known if state not in FINISHED}
        self.num_completed = sum(state == "done" for _, _, state in known)
        self.num_failed = sum(state == "failed" for _, _, state in known)
        async for lines in self._input():
            new = [(seq, line) for seq, line in lines if seq not in accepted]
            await self._until(lambda: len(self._unfinished) <= MAX_AHEAD - FEED_LINES)
            self._unfinished |= {seq for seq, _ in new}
            await asyncio.gather(*[self._accept(seq, line) for seq, line in new])
        await self._until(lambda: not self._unfinished)

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._has_changed.clear()
            await self._has_changed.wait()

    async def _accept(self, seq: int, line: InputLine) -> None:
        batch = self._batch
        body = msgspec.msgpack.encode(Line(line.custom_id, batch.endpoint, batch.key_id, bytes(line.body)))
        fingerprint = hashlib.sha256(body).hexdigest()
        await self._desk.ledger.accept(
            Submission(batch.owner, KIND, fingerprint, body, lane=batch.id, seq=seq, first_seq=None)
        )

    async def _input(self) -> AsyncIterator[list[tuple[int, InputLine]]]:
        with await asyncio.to_thread((self._folder / INPUT).open, "rb") as file:
            lines = _decoded(file)
            while some := await asyncio.to_thread(lambda: list(islice(lines, FEED_LINES))):
                yield some

    async def _finish(self) -> BatchJob:
        """Give up what has no answer, and hand over what has."""
        await self._give_up()
        tally = await self._write_files()
        in_time = "expired" if tally.num_unanswered else "completed"
        output_id = await self._hand_over(OUTPUT, tally.num_completed > 0)
        error_id = await self._hand_over(ERRORS, tally.num_failed + tally.num_unanswered > 0)
        return await self._move(
            status="cancelled" if self._batch.status == "cancelling" else in_time,
            num_completed=tally.num_completed,
            num_failed=tally.num_failed,
            usage=tally.usage(),
            output_file_id=output_id,
            error_file_id=error_id,
        )

    async def _give_up(self) -> None:
        states = await self._desk.ledger.states(self._batch.id)
        left = {future_id for _, future_id, state in states if state not in FINISHED}
        await asyncio.gather(*[self._desk.ledger.cancel(self._batch.owner, future_id) for future_id in left])
        await self._desk.lines.give_up(left)

    async def _write_files(self) -> Tally:
        tally, answered = Tally(), set[int]()
        with (self._folder / OUTPUT).open("wb") as output, (self._folder / ERRORS).open("wb") as errors:
            seq = 0
            while rows := await self._desk.ledger.outcomes(self._batch.id, seq, READ_ROWS):
                answered |= await asyncio.to_thread(_write_answers, rows, output, errors, tally)
                seq = rows[-1].seq or 0
            if self._batch.status == "finalizing":
                async for lines in self._input():
                    await asyncio.to_thread(self._write_unanswered, lines, answered, errors, tally)
        return tally

    def _write_unanswered(
        self, lines: list[tuple[int, InputLine]], answered: set[int], errors: IO[bytes], tally: Tally
    ) -> None:
        for seq, line in lines:
            if seq not in answered:
                tally.num_unanswered += 1
                text = "this request could not be answered before the completion window was over"
                errors.write(unanswered_line(f"{self._batch.id}_{seq}", line.custom_id, "batch_expired", text))

    async def _hand_over(self, name: str, has_content: bool) -> str | None:
        if not has_content:
            return None
        batch, now = self._batch, time.time()
        digest = hashlib.sha256(f"{batch.id}/{name}".encode()).hexdigest()
        seconds = batch.output_seconds or OUTPUT_SECONDS
        upload = Upload(
            id=f"file-{digest[:24]}",
            owner=batch.owner,
            created=now,
            name=f"{batch.id}_{name}",
            purpose="batch_output",
            suffix="",
            num_bytes=0,
            expires=now + seconds,
        )
        return (await self._desk.uploads.adopt(self._folder / name, upload)).id


async def remove(batch_id: str, desk: Desk) -> None:
    """What a batch needed until it was over."""
    await desk.ledger.forget_lane(batch_id)
    await asyncio.to_thread(shutil.rmtree, desk.folder / batch_id, ignore_errors=True)


def _decoded(file: IO[bytes]) -> Iterator[tuple[int, InputLine]]:
    return ((number, msgspec.json.decode(raw, type=InputLine)) for number, raw in numbered(file))


def _write_answers(rows: list[Future], output: IO[bytes], errors: IO[bytes], tally: Tally) -> set[int]:
    """The lines that have an answer, which is written to one of the files."""
    answered = set()
    for row in rows:
        if row.state == "cancelled" or row.request is None or row.result is None:
            continue
        assert row.seq is not None, "every request is a line"
        answered.add(row.seq)
        outcome = msgspec.msgpack.decode(row.result, type=Outcome)
        file = output if outcome.status < 400 else errors
        file.write(output_line(row.id, msgspec.msgpack.decode(row.request, type=Line).custom_id, outcome))
        _count(outcome, tally)
    return answered


def _count(outcome: Outcome, tally: Tally) -> None:
    if outcome.status >= 400:
        tally.num_failed += 1
        return
    tally.num_completed += 1
    usage = msgspec.json.decode(outcome.body, type=_Answer).usage or _Usage()
    tally.num_prompt += usage.prompt_tokens
    tally.num_output += usage.completion_tokens
    tally.num_cached += usage.prompt_tokens_details.cached_tokens
