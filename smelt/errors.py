"""Every error smelt raises on purpose, in one tree; knows nothing of HTTP or the terminal.

SmeltError
├── InvalidInput          a value somebody gave is wrong: the message names it and the remedy
│   ├── ConfigError       a setting or a flag
│   ├── DataError         a record or a file of a dataset: names path and line or byte
│   ├── NotEnoughData     a split is shorter than one block
│   ├── TokenizerError    an unknown tokenizer, or text it cannot represent
│   ├── UnsupportedModel  an architecture or a weight format we do not read
│   ├── UnsafeFile        a file that could run code when loaded
│   ├── SeqReused         another request has that place in its lane
│   ├── SeqAbandoned      the lane waited for that place, and has gone on without it
│   ├── BannedPrompt      a prompt that a rule of the operator forbids
│   ├── TooLarge          a body, or what it asks for, is beyond a limit
│   ├── SlowBody          the rest of a body did not come in time
│   └── UnsupportedEncoding  a body is packed in a way that we do not unpack
├── NotFound              a name that does not exist
│   ├── UnknownModel      no model of that name is served
│   └── UnknownAdapter    the model has no adapter of that name
├── AlreadyExists         a name that is taken
├── InUse                 something that others need as it is, so that it cannot be changed or removed now
├── Unauthorized          no API key, or one that is unknown or revoked
├── Forbidden             a key that may not do this, or an origin that may not ask
│   ├── Banned            whoever asks has broken such rules too often
│   └── WrongHost         the request calls this server by a name that is not its own
├── Unavailable           not now: the message says when to try again
│   ├── RateLimited       this caller has had its share for the moment
│   ├── Overloaded        as many wait already as a queue holds
│   └── WorkerLost        the process that was computing the answer is gone
├── MissingDependency     an optional package or an offline resource is absent
├── OutOfSpace            the disk is full; what was there before is whole
├── CheckpointError       a checkpoint is torn, or belongs to something else
├── StorageError          the database or one of its files is damaged, newer than us or out of reach
├── StaleEpoch            a worker's connection is over, and with it its right to answer
├── TransportError        another process of smelt cannot be reached, or does not speak as one
│   └── ConnectionClosed  it is gone, or we have hung up
└── TrainingError         the run cannot go on
    ├── LostRank          another of its processes is gone
    └── NonFiniteLoss     the loss became NaN or infinite
"""


class SmeltError(Exception):
    """The root: catch this for everything smelt says on purpose."""


class InvalidInput(SmeltError, ValueError):
    """A value that somebody gave is wrong; `param` is its name where a request has one for it."""

    def __init__(self, message: str = "", param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ConfigError(InvalidInput):
    """A setting, a flag or a key of a config file is wrong."""


class DataError(InvalidInput):
    """A source of documents is unreadable; the message names the file and the line or byte."""


class NotEnoughData(InvalidInput):
    """A split holds fewer tokens than one block needs."""


class TokenizerError(InvalidInput):
    """A tokenizer is unknown, or a text has symbols it cannot represent."""


class UnsupportedModel(InvalidInput):
    """A model folder whose architecture or shape we do not support."""


class UnsafeFile(InvalidInput):
    """A file that may run code when it is loaded (a pickle)."""


class SeqReused(InvalidInput):
    """A seq came again with another request; the first one stands."""


class SeqAbandoned(InvalidInput):
    """A seq came so late that its lane has gone on without it."""


class BannedPrompt(InvalidInput):
    """A prompt holds what a rule of this server's operator forbids; whoever asked has got a strike."""


class TooLarge(InvalidInput):
    """A body, or something that a request asks for, is beyond a limit; the message names the limit."""


class SlowBody(InvalidInput):
    """A request's body comes so slowly that it only holds a place."""


class UnsupportedEncoding(InvalidInput):
    """A request's Content-Encoding is not one that we unpack; the message lists those."""


class NotFound(SmeltError, LookupError):
    """A dataset, model, run or file of that name does not exist."""


class UnknownModel(NotFound):
    """No model of that name is served; the message names those that are."""

    param = "model"


class UnknownAdapter(NotFound):
    """The model has no adapter of that name; the message names those it has."""

    param = "adapter"


class AlreadyExists(SmeltError):
    """That name is taken."""


class InUse(SmeltError):
    """Somebody works with it now; the message says who, or what to end first."""


class Unauthorized(SmeltError):
    """There is no API key, or it is unknown or revoked."""


class Forbidden(SmeltError):
    """The key's scopes do not cover this, or the Origin may not ask."""


class Banned(Forbidden):
    """A key, or somebody who uses it, is banned; the message says why, and whom to ask."""


class WrongHost(Forbidden):
    """The Host header names another server: a page of that name may have been pointed here to reach us."""


class Unavailable(SmeltError):
    """It cannot be done now; `retry_after_s` says when to try again."""

    def __init__(self, message: str, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class RateLimited(Unavailable):
    """This caller has had its share of requests for the moment."""


class Overloaded(Unavailable):
    """As many requests wait already as a queue holds, whoever sent them."""


class WorkerLost(Unavailable):
    """The process that was computing the answer is gone; asking again starts anew."""


class MissingDependency(SmeltError, ImportError):
    """An optional package, or a file that would need a download, is absent."""


class OutOfSpace(SmeltError, OSError):
    """The disk is full; whatever was complete before is still complete."""


class CheckpointError(SmeltError):
    """A checkpoint is torn, or does not belong to this model or dataset."""


class TransportError(SmeltError, ConnectionError):
    """Another process of smelt cannot be reached, refuses us, or does not speak our protocol."""


class ConnectionClosed(TransportError):
    """The process at the other end is gone, or this end has hung up; nothing sent now would arrive."""


class StorageError(SmeltError):
    """The database, or a file that belongs to it, is damaged, written by a newer smelt, or out of reach."""


class StaleEpoch(SmeltError):
    """A result from a worker that no longer holds the request: its connection ended, or it was cancelled."""


class TrainingError(SmeltError, RuntimeError):
    """A run cannot go on."""


class LostRank(TrainingError):
    """Another process of a distributed run has ended, or cannot be reached; the last checkpoint stands."""


class NonFiniteLoss(TrainingError):
    """The loss became NaN or infinite; names the step, the documents and the last good checkpoint."""
