"""What the processes say to each other, as types; knows no bytes and no sockets.

The API's process holds the database and answers clients. Workers and launchers dial in to it. What the API says to
them and what they answer:

    work of the ledger      Grant, Cancel ->     <- Result
    live requests           Generate, Cancel ->  <- TextChunk ..., Finish for each answer
                            Embed, Cancel ->     <- Embedded, Finish
                            Render, Cancel ->    <- Rendered, Finish
                            Classify, Cancel ->  <- Classified, Finish
                            LoadModel, UnloadModel -> <- Finish
    memory for runs         Lend ->              <- Lent, Finish (a worker)
                            Lent ->              <- WorkerStatus (a launcher)
    training sessions       LogPart, SnapshotKept -> <- LogWanted, SnapshotTaken
    what is going on        Ping ->              <- Pong, WorkerStatus

A body travels in its frame, whatever its size: both ends hold it in memory anyway, and a file would tie workers to
the API's disk. What does not fit into a frame is refused.

A class's name travels as its tag, so names of classes and fields are the wire format. A new field needs a default:
then older peers neither miss it nor stumble over it. Any other change to what is already here needs another
PROTOCOL_VERSION (in `handshake`).
"""

from typing import Any

import msgspec

from smelt.transport.operations import LogEntry
from smelt.types import ChatExample, ChatMessage, FinishReason, ModelLoad, SamplingParams, TokenLogprob, ToolCall


class Failure(msgspec.Struct, frozen=True):
    """Why something was not done."""

    error: str  # the name of a class in smelt.errors; SmeltError where the cause is a bug
    message: str  # for the person who asked
    param: str | None = None  # which part of the request is wrong
    retry_after_s: int | None = None  # when to ask again


class Grant(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    """A row of the ledger is this worker's to do, for as long as the connection of this epoch lives.

    It is answered by one Result, also after a Cancel; until then it takes a place of the worker's.
    """

    future_id: str
    epoch: int
    owner: str
    lane: str | None  # rows of a lane are granted in seq order; None has no order
    seq: int | None
    kind: str
    attempt: int = 1  # above 1: a worker was lost while it had this row, so do it alone
    body: bytes = b""


class Result(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    """A granted row is done, or has failed. One from a stale epoch is refused by the ledger."""

    future_id: str
    epoch: int  # of the Grant, even if the worker has dialled in again since
    body: bytes = b""
    failure: Failure | None = None


class Completion(msgspec.Struct, frozen=True):
    """The body of a Result for a Grant of the kind "generate", whose own body is a Generate."""

    text: str
    reason: FinishReason
    num_prompt_tokens: int
    num_output_tokens: int
    num_cached_tokens: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()
    tool_calls: tuple[ToolCall, ...] = ()


class TrainRequest(msgspec.Struct, frozen=True):
    """The body of a Grant of the kind "train", which a launcher does in a process of its own."""

    run_id: str
    config: dict[str, Any]  # the values of a RunConfig, its recipe and its out_dir among them


class Generate(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    """Write the continuation of a prompt (text or token ids) or, where there are messages, the next turn.

    Of `best_of` answers the `num_samples` likeliest are given, numbered from 0; sample i is drawn with seed + i. With
    `echo` an answer begins with the prompt, and so do its log-probabilities.
    """

    request_id: str  # never used before, so made by the API and not by its clients: late pieces of another would mix in
    owner: str  # the scheduler is fair between owners
    model: str
    prompt: str | tuple[int, ...] = ""
    messages: tuple[ChatMessage, ...] = ()
    params: SamplingParams = SamplingParams()
    tools: tuple[dict[str, Any], ...] = ()  # definitions in OpenAI's form, for the chat template
    must_call: bool = False  # the grammar makes the answer a call as JSON, {"name": ..., "arguments": ...}
    num_samples: int = 1
    best_of: int = 1  # at least num_samples; where it is more, nothing is sent before all are written
    echo: bool = False
    adapter: str | None = None  # a LoRA adapter of the model: its folder below the home folder
    key_id: str = ""  # of the API key, where one was needed
    user: str = ""  # whom the key's owner says it is for
    is_live: bool = True  # somebody waits for it, as nobody does for a batch or in the background


class TextChunk(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    """More of an answer. Tokens may come without text, while a stop string or a character is still incomplete."""

    request_id: str
    text: str
    token_ids: tuple[int, ...] = ()
    index: int = 0  # of the answer, where there are several
    logprobs: tuple[TokenLogprob, ...] = ()  # of the tokens whose text is shown with this piece or before


class Finish(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    """An answer has ended. "aborted" after a Cancel or with a failure: then all of the request's have."""

    request_id: str
    reason: FinishReason
    num_prompt_tokens: int
    num_output_tokens: int
    failure: Failure | None = None
    index: int = 0
    num_cached_tokens: int = 0  # of the prompt, which had been computed before
    tool_calls: tuple[ToolCall, ...] = ()  # what the text was understood as


class Embed(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    """Turn texts (or token ids) into vectors: the mean of a model's last hidden states."""

    request_id: str
    owner: str
    model: str
    inputs: tuple[str | tuple[int, ...], ...]
    is_live: bool = True


class Embedded(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    """The vectors, one after the other, as little-endian fp32. A Finish follows, which counts the tokens."""

    request_id: str
    vectors: bytes
    width: int


class Render(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    """Turn conversations into data to train on, by a model's chat template."""

    request_id: str
    owner: str
    model: str
    examples: tuple[ChatExample, ...]


class Rendered(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    """The data, one for each example: a ForwardBackwardRequest that has nothing else. A Finish follows."""

    request_id: str
    data: bytes


class Classify(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    """Say how probable each label of a classifier is for each of the texts."""

    request_id: str
    owner: str
    model: str
    texts: tuple[str, ...]


class Classified(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    """The labels, and for each text the probability of each, as little-endian fp32. A Finish follows."""

    request_id: str
    labels: tuple[str, ...]
    probabilities: bytes


class LoadModel(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    """Have a model ready to answer; a Finish says when it is, or why it cannot be."""

    request_id: str
    model: str


class UnloadModel(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    """Give a model's memory back once its answers have ended; a Finish says when."""

    request_id: str
    model: str


class Lend(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    """Leave so much memory of your device to runs, as long as this connection lives or until another number comes."""

    request_id: str
    num_bytes: int  # for all runs together; 0: for none any more
    model: str = ""  # none in particular


class Lent(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    """A worker leaves that to runs, and has unloaded these idle models for it; a Finish follows.

    To a launcher: all workers of its machine do.
    """

    request_id: str
    unloaded: tuple[str, ...] = ()


class Cancel(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    """Nobody wants this any more: the request_id of a Generate or the future_id of a Grant."""

    request_id: str


class LogWanted(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    """A worker was granted an operation of a lane that it does not hold: what came before, after seq `after`?"""

    lane: str
    after: int
    before: int


class LogPart(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    """Operations of a lane in order; another part follows unless this `is_last`. With a failure the log is lost.

    `after` and `before` are those of the LogWanted: a worker may have begun anew with the lane since, and asked again.
    """

    lane: str
    after: int
    before: int
    entries: tuple[LogEntry, ...]
    is_last: bool
    failure: Failure | None = None


class SnapshotTaken(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    """A session's state after that seq is on the disk: the log up to that of the `previous` one may be forgotten."""

    lane: str
    seq: int
    previous: int = -1


class SnapshotKept(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    """All results up to a snapshot are kept, so that no snapshot older than its previous one is needed any more."""

    lane: str
    seq: int


class Ping(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    """Asks for a Pong: a process that hangs, or a machine without power, sends no end of file."""

    sent_at: float  # seconds on the sender's monotonic clock


class Pong(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    """Answers a Ping with its own time, so that the sender knows how long it took."""

    sent_at: float


class EngineStatus(msgspec.Struct, frozen=True, omit_defaults=True):
    """What the engine of a loaded model is doing, and what it has done since it was loaded (`total_`)."""

    model: str
    num_bytes: int = 0  # of memory that the model may take
    num_running: int = 0  # sequences
    num_waiting: int = 0
    num_blocks: int = 0  # of its cache
    num_blocks_used: int = 0  # by sequences; what is only kept for later does not count
    batch_size: int = 0  # tokens of the last step
    total_prompt_tokens: int = 0
    total_cached_tokens: int = 0  # of those, which needed no computing
    total_preempted: int = 0


class WorkerStatus(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    """What a worker is doing; sent after the handshake and when it changes, a few times a second at most."""

    device: str
    models: tuple[str, ...] = ()  # loaded, ready to answer
    num_running: int = 0  # sequences in the engine
    num_waiting: int = 0
    leaving: bool = False  # finishes what it has, takes nothing new, and then hangs up
    engines: tuple[EngineStatus, ...] = ()  # of its models
    model_loads: tuple[ModelLoad, ...] = ()
    num_needed_bytes: int = 0  # of a launcher: that its run needs on the device; it hears a Lent
    num_lent_bytes: int = 0  # of a worker: that it leaves to runs


Message = (
    Grant
    | Result
    | Generate
    | TextChunk
    | Finish
    | Embed
    | Embedded
    | Render
    | Rendered
    | Classify
    | Classified
    | LoadModel
    | UnloadModel
    | Lend
    | Lent
    | LogWanted
    | LogPart
    | SnapshotTaken
    | SnapshotKept
    | Cancel
    | Ping
    | Pong
    | WorkerStatus
)
