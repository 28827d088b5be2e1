"""Answers as figures: what each cost and how long its pieces took, whoever asked for it; knows no route."""

import time
from contextlib import aclosing

from smelt.api import telemetry
from smelt.control.abuse_checker import AbuseChecker
from smelt.control.completions import Pieces, written
from smelt.storage.futures import Granted
from smelt.transport.messages import Completion, Finish, Result


async def metered(model: str, pieces: Pieces) -> Pieces:
    """The same pieces, counted and timed; one that a client leaves ends as "left"."""
    last = time.perf_counter()
    waiting_for_first, reason = True, "left"
    try:
        async with aclosing(pieces):
            async for number, piece in pieces:
                now = time.perf_counter()
                if isinstance(piece, Finish):
                    _count(model, piece, is_first=piece.index == 0)
                elif waiting_for_first:
                    telemetry.observe_first_token(model, now - last)
                    waiting_for_first = False
                else:
                    telemetry.observe_gap(model, now - last)
                last = now
                yield number, piece
        reason = ""
    except Exception:
        reason = "failed"
        raise
    finally:
        if reason:
            telemetry.count_answer(model, reason)


def note_background(checker: AbuseChecker, row: Granted, result: Result) -> None:
    """Count what a row of the ledger has become, where it is answers, and the rules that they break."""
    if (found := written(row, result)) is not None:
        request, completions = found
        for index, completion in enumerate(completions):
            _count(request.model, completion, is_first=index == 0)
        checker.note(request, completions)


def _count(model: str, end: Finish | Completion, is_first: bool) -> None:
    """Samples share their prompt, which the first of them counts."""
    num_prompt, num_cached = (end.num_prompt_tokens, end.num_cached_tokens) if is_first else (0, 0)
    telemetry.count_answer(model, end.reason, num_prompt, end.num_output_tokens, num_cached)
