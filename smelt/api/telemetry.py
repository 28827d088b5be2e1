"""What the server counts, for Prometheus, and what it writes to its log; knows no route and keeps no secret.

A request is counted under its route's template, so that ids in paths make no new series. The log has a line per
request: no query string, no body, and nothing that looks like a key.
"""

import asyncio
import logging
import re
import sys
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import lru_cache
from itertools import accumulate
from typing import Any, TextIO

import msgspec
import structlog
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import Scope
from structlog.typing import WrappedLogger

from smelt.control.model_server import WorkerInfo

REGISTRY = CollectorRegistry()
for collector in (ProcessCollector, PlatformCollector, GCCollector):
    collector(registry=REGISTRY)

# Answers stream for minutes; a health check takes a millisecond.
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
in_flight = Gauge("smelt_http_requests_in_flight", "Requests under way.", registry=REGISTRY)
tokens = Counter("smelt_tokens", "Tokens of finished answers.", ["model", "kind"], registry=REGISTRY)
client_events = Counter(
    "smelt_client_events", "What Tinker's clients tell of themselves.", ["event", "severity"], registry=REGISTRY
)
answers = Counter("smelt_answers", "Answers by how they ended.", ["model", "reason"], registry=REGISTRY)
worker_sequences = Gauge("smelt_worker_sequences", "Sequences of each worker.", ["worker", "state"], registry=REGISTRY)
workers_connected = Gauge("smelt_workers", "Workers that are connected.", registry=REGISTRY)

CLIENT_EVENTS = frozenset({"SESSION_START", "SESSION_END", "UNHANDLED_EXCEPTION", "GENERIC_EVENT"})
SEVERITIES = frozenset({"DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"})
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
LOG_DELAY_S = 0.05
SECRET = re.compile(r"\b(tml-|sk-|hf_|Bearer )[\w.~+/=-]+")
SECRET_SIGNS = ("tml-", "sk-", "hf_", "Bearer ")


class Requests(Collector):
    """Answered requests. Counted on the event loop alone, so without locks, which would cost more than the gate."""

    def __init__(self) -> None:
        self._counts: defaultdict[tuple[str, str, int], int] = defaultdict(int)

    def count(self, method: str, route: str, status: int) -> None:
        """One more."""
        self._counts[method, route, status] += 1

    def collect(self) -> Iterator[Metric]:
        """The figures, as Prometheus wants them."""
        family = CounterMetricFamily("smelt_http_requests", "Requests answered.", labels=["method", "route", "status"])
        for (method, route, status), count in self._counts.items():
            family.add_metric([method, route, str(status)], count)
        yield family


class Durations(Collector):
    """Seconds by one label, in buckets; for what is observed thousands of times a second, on the event loop alone."""

    def __init__(self, name: str, text: str, label: str) -> None:
        self._name, self._text, self._label = name, text, label
        self._counts: defaultdict[str, list[int]] = defaultdict(lambda: [0] * (len(SECONDS) + 1))
        self._sums: defaultdict[str, float] = defaultdict(float)

    def observe(self, value: str, seconds: float) -> None:
        """Something took so long."""
        self._counts[value][bisect_left(SECONDS, seconds)] += 1
        self._sums[value] += seconds

    def collect(self) -> Iterator[Metric]:
        """The figures, as Prometheus wants them: each bucket holds what the ones before it hold."""
        family = HistogramMetricFamily(self._name, self._text, labels=[self._label])
        bounds = [*(str(float(bound)) for bound in SECONDS), "+Inf"]
        for value, counts in self._counts.items():
            family.add_metric([value], list(zip(bounds, accumulate(counts), strict=True)), self._sums[value])
        yield family


class Engines(Collector):
    """What the engines of all workers are doing, as the workers have told last; cleared with them."""

    def __init__(self) -> None:
        self.workers: list[WorkerInfo] = []

    def collect(self) -> Iterator[Metric]:
        """The figures, as Prometheus wants them."""
        labels = ["worker", "model"]
        blocks = GaugeMetricFamily("smelt_engine_blocks", "Blocks of each cache.", labels=[*labels, "state"])
        others: list[tuple[GaugeMetricFamily | CounterMetricFamily, str]] = [
            (kind(name, text, labels=labels), field) for kind, name, text, field in ENGINE_FIGURES
        ]
        for worker in self.workers:
            for load in worker.model_loads:
                place = [worker.name, load.name]
                blocks.add_metric([*place, "used"], load.num_blocks_used)
                blocks.add_metric([*place, "free"], load.num_blocks - load.num_blocks_used)
                for family, field in others:
                    family.add_metric(place, getattr(load, field))
        yield blocks
        yield from (family for family, _ in others)


# kind, name, text, field of ModelLoad
ENGINE_FIGURES: list[tuple[type[GaugeMetricFamily] | type[CounterMetricFamily], str, str, str]] = [
    (GaugeMetricFamily, "smelt_engine_model_bytes", "Memory that a model may take.", "num_bytes"),
    (GaugeMetricFamily, "smelt_engine_batch_tokens", "Tokens of the last step.", "batch_size"),
    (CounterMetricFamily, "smelt_engine_prompt_tokens", "Tokens of prompts.", "total_prompt_tokens"),
    (CounterMetricFamily, "smelt_engine_cached_tokens", "Of those, tokens found in the cache.", "total_cached_tokens"),
    (CounterMetricFamily, "smelt_engine_preemptions", "Sequences put back for lack of blocks.", "total_preempted"),
]

requests = Requests()
engines = Engines()
request_seconds = Durations("smelt_http_request_seconds", "From a request to the end of its answer.", "route")
first_token_seconds = Durations("smelt_first_token_seconds", "From a request to its first token.", "model")
gap_seconds = Durations("smelt_inter_token_seconds", "Between two pieces of an answer.", "model")
for figures in (requests, engines, request_seconds, first_token_seconds, gap_seconds):
    REGISTRY.register(figures)


def count_client_event(event: dict[str, Any]) -> None:
    """A client of Tinker's has told of something; what it writes names no series of ours."""
    name, severity = str(event.get("event")), str(event.get("severity"))
    client_events.labels(
        name if name in CLIENT_EVENTS else "other", severity if severity in SEVERITIES else "other"
    ).inc()


def count_request(method: str, route: str, status: int, seconds: float) -> None:
    """A request has ended. `route` is a template, or a word where no route was found."""
    requests.count(method if method in METHODS else "other", route, status)
    request_seconds.observe(route, seconds)


def route_of(scope: Scope) -> str:
    """The template of the route that answered, such as /v1/models/{id}; "none" where there was none."""
    route = scope.get("route")
    return getattr(route, "path_format", None) or getattr(route, "path", None) or "none"


def count_answer(
    model: str, reason: str, num_prompt_tokens: int = 0, num_output_tokens: int = 0, num_cached_tokens: int = 0
) -> None:
    """An answer has ended. `model` must be the name of a served model, not whatever a client wrote."""
    _answer_series(model, reason).inc()
    counts = (num_prompt_tokens, num_cached_tokens, num_output_tokens)
    for series, count in zip(_token_series(model), counts, strict=True):
        series.inc(count)


def observe_first_token(model: str, seconds: float) -> None:
    """How long a client waited for the first token."""
    first_token_seconds.observe(model, seconds)


def observe_gap(model: str, seconds: float) -> None:
    """How long a client waited for the next piece."""
    gap_seconds.observe(model, seconds)


@lru_cache(maxsize=4096)
def _answer_series(model: str, reason: str) -> Counter:
    return answers.labels(model, reason)


@lru_cache(maxsize=1024)
def _token_series(model: str) -> tuple[Counter, Counter, Counter]:
    """Of prompts, of what of them needed no computing, and of answers."""
    return tokens.labels(model, "prompt"), tokens.labels(model, "cached_prompt"), tokens.labels(model, "output")


def exposition(workers: list[WorkerInfo]) -> bytes:
    """All of it in Prometheus's text format, with what the workers do at this moment."""
    workers_connected.set(len(workers))
    engines.workers = workers
    worker_sequences.clear()
    for worker in workers:
        worker_sequences.labels(worker.name, "running").set(worker.num_running)
        worker_sequences.labels(worker.name, "waiting").set(worker.num_waiting)
    return generate_latest(REGISTRY)


class RequestLine(msgspec.Struct):
    """What the log has of a request."""

    method: str
    path: str  # without its query
    status: int
    ms: float
    key: str | None  # the key's id
    request_id: str
    event: str = "request"
    level: str = "info"
    timestamp: datetime = msgspec.field(default_factory=lambda: datetime.now(UTC))


class RequestLog:
    """A line per request, written together with those of the next moment: one by one they cost more than the gate.

    As JSON they go past structlog for the same reason.
    """

    def __init__(self) -> None:
        self._stream: TextIO | None = None
        self._lines: list[RequestLine] = []
        self._timer: asyncio.TimerHandle | None = None

    def open(self, stream: TextIO | None) -> None:
        """Write JSON there, or with None let structlog write as it is configured."""
        self.flush()
        self._stream = stream

    def write(self, line: RequestLine) -> None:
        """One request has ended."""
        self._lines.append(line)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(LOG_DELAY_S, self.flush)

    def flush(self) -> None:
        """Write what has come together."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer, lines, self._lines = None, self._lines, []
        if self._stream is None:
            for line in lines:
                structlog.get_logger().info(**msgspec.structs.asdict(line))
        elif lines:
            self._stream.write(without_secrets(None, "info", "".join(_json(line) + "\n" for line in lines)))
            self._stream.flush()


request_log = RequestLog()


def configure_logging(stream: TextIO = sys.stderr, level: int = logging.INFO, *, for_people: bool = False) -> None:
    """Lines for people, or JSON; the same for modules that use the standard `logging`."""
    shared: list[Any] = [
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    renderer = structlog.dev.ConsoleRenderer() if for_people else structlog.processors.JSONRenderer(_json)
    structlog.configure(
        processors=[*shared, renderer, without_secrets],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.WriteLoggerFactory(stream),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[structlog.stdlib.add_logger_name, *shared],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer, without_secrets],
        )
    )
    logging.root.handlers[:] = [handler]
    request_log.open(None if for_people else stream)
    logging.root.setLevel(level)
    logging.getLogger("alembic").setLevel(logging.WARNING)  # it says at each start that it has started


def without_secrets(_logger: WrappedLogger, _method: str, line: Any) -> str:
    """Cut out of a finished line whatever looks like a key: they end up in paths, and errors quote what they got."""
    return SECRET.sub(r"\1...", line) if any(sign in line for sign in SECRET_SIGNS) else line


def _json(value: Any, **_: Any) -> str:
    return msgspec.json.encode(value, enc_hook=str).decode()
