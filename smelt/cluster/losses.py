"""What of many sessions' losses is computed at once, and what comes of each; knows no lanes' order and no wire.

Every datum is a work of its own, so that a large request can be cut anywhere: what comes of it is the same bits.
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from smelt.cluster.lanes import Lane, Loss
from smelt.training.session import Outcome, SessionTrainer, Work
from smelt.training.trained_adapter import TrainedAdapter
from smelt.training.trained_model import TrainedModel
from smelt.transport.tinker_wire import decode_forward_backward, encode_outputs
from smelt.types import Datum

SECONDS_ALONE = 1.0  # of a pass while no answers are being written
SECONDS_SHARED = 0.1  # while some are
FIRST_RATE = 4000.0  # tokens a second, before anything was measured
MOST_TOKENS = 16384


@dataclass(frozen=True, slots=True)
class Turn:
    """A datum whose turn it is."""

    lane: Lane
    loss: Loss
    number: int
    trained: TrainedAdapter | TrainedModel

    @property
    def datum(self) -> Datum:
        """The request's datum of that number."""
        return self.loss.data[self.number]

    def work(self) -> Work:
        """What the trainer has to do."""
        loss = self.loss
        return Work(self.trained, [self.datum], loss.loss_name, loss.loss_settings, loss.forward_only, self.number)


class Pace:
    """How many tokens a pass may have, by how long earlier ones took."""

    def __init__(self) -> None:
        self._rate = FIRST_RATE

    def budget(self, *, is_shared: bool) -> int:
        """Tokens of the next pass."""
        return min(MOST_TOKENS, int(self._rate * (SECONDS_SHARED if is_shared else SECONDS_ALONE)))

    def note(self, num_tokens: int, seconds: float) -> None:
        """A pass took so long."""
        self._rate += 0.3 * (num_tokens / max(seconds, 1e-6) - self._rate)


def begun(body: bytes) -> Loss:
    """A request's loss. InvalidInput where it cannot be read."""
    request = decode_forward_backward(body)
    return Loss(request.data, request.loss_name, request.loss_settings, request.forward_only)


def choose(waiting: Sequence[tuple[Lane, Iterator[Turn]]], budget: int) -> list[Turn]:
    """One datum of each lane after the other until the budget is spent; one at least."""
    chosen: list[Turn] = []
    num_tokens = 0
    lines = [line for _, line in waiting]
    while lines:
        for line in lines.copy():
            if chosen and num_tokens >= budget:
                return chosen
            turn = next(line, None)
            if turn is None:
                lines.remove(line)
            else:
                chosen.append(turn)
                num_tokens += len(turn.datum.tokens)
    return chosen


def compute(trainer: SessionTrainer, turns: Sequence[Turn], pace: Pace) -> None:
    """Do what was chosen, and note in each loss what came of it."""
    began = time.perf_counter()
    works = [turn.work() for turn in turns]
    outcomes: Sequence[Outcome | Exception]
    try:
        outcomes = trainer.forward_backward(works)
    except Exception as error:  # noqa: BLE001 - whatever it was, it must not end the thread
        outcomes = [error] * len(works)
    for turn, outcome in zip(turns, outcomes, strict=True):
        if isinstance(outcome, Exception):
            turn.loss.error = turn.loss.error or outcome
        else:
            turn.loss.outcomes.append(outcome)
    seconds, num_tokens = time.perf_counter() - began, sum(len(turn.datum.tokens) for turn in turns)
    pace.note(num_tokens, seconds)
    for turn in turns:
        turn.lane.toll.seconds += seconds * len(turn.datum.tokens) / num_tokens


def result_of(loss: Loss) -> bytes:
    """The answer to a request whose data are all done."""
    metrics = {"loss:sum": math.fsum(outcome.metrics["loss:sum"] for outcome in loss.outcomes)}
    for name in loss.outcomes[0].metrics if loss.outcomes else ():
        if name != "loss:sum":
            metrics[name] = math.fsum(outcome.metrics[name] for outcome in loss.outcomes) / len(loss.outcomes)
    return encode_outputs([outcome.logprobs[0] for outcome in loss.outcomes], metrics)
