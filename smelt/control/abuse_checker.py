"""AbuseChecker: refuses those who are banned, and prompts and answers that break a rule; knows no HTTP.

Without rules a prompt costs a look into a dict, and an answer nothing. Bans and rules are read again while requests
come, so that what another process changes is known within a second.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import Future
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
from sqlalchemy import Engine

from smelt.control.ban_rules import OutputWatch, Patterns, Rules, read_rules
from smelt.control.bans import NO_KEY, Limits, Subject, add_strike
from smelt.errors import Banned, BannedPrompt, ConfigError, InvalidInput
from smelt.settings import Settings
from smelt.storage import records
from smelt.storage.records import Ban
from smelt.storage.writer import Writer
from smelt.transport.messages import Completion, Finish, Generate, TextChunk

MAX_AGE_S = 0.5  # of what we know, before a request has it read again
MAX_CHARS_AT_ONCE = 20_000  # longer prompts are searched on a thread, so that nobody waits for them

Stamp = tuple[int, int] | None
Pieces = AsyncGenerator[TextChunk | Finish, None]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Known:
    """What was read last: who is banned (key, user) and why, and the rules."""

    bans: dict[tuple[str, str], str] = field(default_factory=dict)
    rules: Rules = field(default_factory=Rules)


class AbuseChecker:
    """Knows bans and rules, and counts strikes. ConfigError where the rules are broken at the start."""

    def __init__(
        self, settings: Settings, database: Engine, writer: Writer, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._file = settings.ban_rules
        self._limits = Limits(settings.ban_strikes, settings.ban_key_strikes)
        self._database = database
        self._writer = writer
        self._clock = clock
        self._stale_at = -1.0
        self._num_strikes = 0
        self._refreshing = asyncio.Lock()
        self._stamp = _stamp_of(self._file)
        self._known = Known(rules=read_rules(self._file) if self._file else Rules())

    async def check(self, request: Generate) -> None:
        """Banned for those who are; BannedPrompt, and a strike, where a rule forbids what they ask."""
        subject = _subject_of(request)
        await self.check_subject(subject)
        rules = self._known.rules
        if not rules.prompts:
            return
        rule = await _searched(rules.prompts, _texts_of(request))
        if rule is not None:
            await self.strike(subject, rule, "a prompt")
            raise BannedPrompt(
                f"this request breaks the rule {rule!r} of this server; whoever goes on with such ones is banned"
            )

    async def check_subject(self, subject: Subject) -> None:
        """Banned for a key, or a user of it, that is."""
        if self._clock() >= self._stale_at:
            await self._refresh()
        bans = self._known.bans
        for key, who in (
            ((subject.key_id, ""), "this API key"),
            ((subject.key_id, subject.user), f"the user {subject.user!r} of this API key"),
        ):
            if key in bans:
                raise Banned(f"{who} is banned ({bans[key]}): ask the administrator of this server to lift that")

    async def strike(self, subject: Subject, rule: str, what: str) -> None:
        """Count a broken rule; it is on the disk when this returns, and whom it was one too many is banned."""
        await asyncio.wrap_future(self._strike(subject, rule, what))
        self._num_strikes += 1
        self._stale_at = -1.0

    def watched(self, request: Generate, pieces: Pieces) -> Pieces:
        """The pieces of a request's answers, until one breaks a rule: then all of them end, as "content_filter".

        The work is cancelled there, so what it has cost is not known: such an end counts the tokens that came.
        """
        return self._watched(request, pieces) if self._known.rules.outputs else pieces

    def note(self, request: Generate, completions: Sequence[Completion]) -> None:
        """Count a broken rule of answers that were written in the background."""
        broken = (self._forbidding(completion) for completion in completions)
        if (rule := next(filter(None, broken), None)) is not None:
            self._strike(_subject_of(request), rule, "an answer in the background")

    def filtered(self, completion: Completion) -> Completion:
        """An answer as it may be shown: one that breaks a rule, and was not shown yet, has no text."""
        if self._forbidding(completion) is None:
            return completion
        return msgspec.structs.replace(completion, text="", reason="content_filter", logprobs=(), tool_calls=())

    async def _watched(self, request: Generate, pieces: Pieces) -> Pieces:
        watches = [OutputWatch(self._known.rules) for _ in range(request.num_samples)]
        num_tokens = dict.fromkeys(range(request.num_samples), 0)  # of the answers that have not ended
        async with aclosing(pieces):
            async for piece in pieces:
                rule = _broken_by(watches[piece.index], piece)
                if rule is not None:
                    break
                if isinstance(piece, Finish):
                    num_tokens.pop(piece.index, None)  # an aborted one ends all, whichever it is said of
                else:
                    num_tokens[piece.index] += len(piece.token_ids)
                yield piece
            else:
                return
        await self.strike(_subject_of(request), rule, "an answer")
        for index, num in num_tokens.items():
            yield Finish(request.request_id, "content_filter", 0, num, index=index)

    def _forbidding(self, completion: Completion) -> str | None:
        texts = (completion.text, *(call.arguments for call in completion.tool_calls))
        return _first_broken(self._known.rules.outputs, texts)

    def _strike(self, subject: Subject, rule: str, what: str) -> Future[None]:
        log.warning("%s breaks the rule %r: key %s, user %r", what, rule, subject.key_id, subject.user)
        limits = self._limits
        return self._writer.write(lambda connection: add_strike(connection, subject, rule, limits))

    async def _refresh(self) -> None:
        """Read again; whoever asks meanwhile waits for the same reading."""
        async with self._refreshing:
            if (began := self._clock()) >= self._stale_at:
                num_strikes = self._num_strikes
                self._known = await asyncio.to_thread(self._read)
                if num_strikes == self._num_strikes:  # else it may have come too early
                    self._stale_at = began + MAX_AGE_S

    def _read(self) -> Known:
        with self._database.connect() as connection:
            bans = records.of_all_owners(connection, Ban)
        return Known({(ban.key_id, ban.user): ban.reason for ban in bans}, self._read_rules())

    def _read_rules(self) -> Rules:
        """The rules as the file has them now; the last good ones where it is broken."""
        stamp = _stamp_of(self._file)
        if self._file is None or stamp == self._stamp:
            return self._known.rules
        self._stamp = stamp
        try:
            rules = read_rules(self._file)
        except ConfigError as error:
            log.error("the rules stay as they were: %s", error)  # noqa: TRY400 - the operator's mistake, in a line
            return self._known.rules
        log.info("read the rules in %s again", self._file)
        return rules


def _subject_of(request: Generate) -> Subject:
    return Subject(request.owner, request.key_id or NO_KEY, request.user)


def _texts_of(request: Generate) -> list[str]:
    """Whatever a request brings to be read by the model. InvalidInput where that is not text."""
    if not isinstance(request.prompt, str):
        raise InvalidInput("this server has rules for prompts, so it takes no token ids; send text", "prompt")
    texts = [request.prompt] if request.prompt else []
    for message in request.messages:
        texts += [message.content, *(call.arguments for call in message.tool_calls)]
    return [*texts, *(msgspec.json.encode(tool).decode() for tool in request.tools)]


async def _searched(patterns: Patterns, texts: Sequence[str]) -> str | None:
    if sum(map(len, texts)) <= MAX_CHARS_AT_ONCE:
        return _first_broken(patterns, texts)
    return await asyncio.to_thread(_first_broken, patterns, texts)


def _first_broken(patterns: Patterns, texts: Sequence[str]) -> str | None:
    return next((rule for text in texts if (rule := patterns.forbidding(text)) is not None), None)


def _broken_by(watch: OutputWatch, piece: TextChunk | Finish) -> str | None:
    """The rule that an answer breaks with a piece; the functions that it calls are part of it."""
    if isinstance(piece, TextChunk):
        return watch.push(piece.text) if piece.text else None
    rule = watch.finish()
    return rule or next((found for call in piece.tool_calls if (found := watch.push(call.arguments)) is not None), None)


def _stamp_of(file: Path | None) -> Stamp:
    """What tells whether a file has changed; None where there is none."""
    try:
        found = file.stat() if file else None
    except OSError:
        return None
    return (found.st_mtime_ns, found.st_size) if found else None
