"""Operations of a session as a ledger would have kept them, noted as figures; nothing is computed."""

import msgspec
import numpy as np

from smelt.control.session_figures import SessionFigures
from smelt.storage.futures import Granted
from smelt.transport.messages import Result
from smelt.transport.operations import OptimStep, Sample, Sampler
from smelt.transport.tinker_wire import Sampled, encode_data, encode_outputs, encode_samples, with_loss
from smelt.types import Datum, SamplingParams

LANE = "s:train:0"
TOKENS = np.arange(4, dtype=np.int32)


def row(kind: str, seq: int | None, request: bytes, lane: str) -> Granted:
    return Granted(f"f{seq}", "ann", kind, lane, seq, 0, request)


def done(body: bytes) -> Result:
    return Result("f", 1, body)


class NotedSession:
    """A client whose operations are done at once."""

    def __init__(self, figures: SessionFigures, lane: str = LANE) -> None:
        self.figures = figures
        self.lane = lane
        self.seq = 0

    def loss(self, total: float, *, forward_only: bool = False, **inputs: np.ndarray) -> None:
        self.seq += 1
        data = encode_data([Datum(TOKENS, {"target_tokens": TOKENS.astype(np.int64), **inputs})])
        request = with_loss(data, self.lane, "cross_entropy", {}, forward_only)
        answer = encode_outputs([np.zeros(4, np.float32)], {"loss:sum": total})
        self.figures.note(row("forward_backward", self.seq, request, self.lane), done(answer))

    def step(self) -> None:
        self.seq += 1
        request = msgspec.msgpack.encode(OptimStep(learning_rate=0.5))
        answer = msgspec.json.encode({"type": "optim_step", "metrics": {"grad_norm": 2.0}})
        self.figures.note(row("optim_step", self.seq, request, self.lane), done(answer))

    def sample(self, lane: str | None) -> None:
        request = msgspec.msgpack.encode(Sample(Sampler("s:sample:0", "tiny", lane=lane), (1, 2), SamplingParams()))
        answer = encode_samples([Sampled([1, 2, 3], [-1.0, -2.0, -3.0], True), Sampled([1], [-2.0], True)])
        self.figures.note(row("sample", None, request, "s:sample:0"), done(answer))
