"""Errors as they travel: a class of `smelt.errors` by its name, and a message; knows no HTTP and no ledger."""

from smelt import errors
from smelt.errors import AlreadyExists, Forbidden, InUse, InvalidInput, NotFound, SmeltError, Unauthorized, Unavailable
from smelt.transport.messages import Failure

OF_THE_USER = (InvalidInput, NotFound, AlreadyExists, InUse, Unauthorized, Forbidden)


def failure_of(error: Exception) -> Failure:
    """What to tell the other side. Of a bug only its kind: the rest is for the log of the process that has it."""
    if isinstance(error, SmeltError):
        param, retry_after_s = getattr(error, "param", None), getattr(error, "retry_after_s", None)
        return Failure(type(error).__name__, str(error), param, retry_after_s)
    return Failure(SmeltError.__name__, f"something went wrong inside ({type(error).__name__}); the log says more")


def error_of(failure: Failure) -> SmeltError:
    """The error to raise. A class that this version does not know is a SmeltError."""
    kind = getattr(errors, failure.error, SmeltError)
    known = isinstance(kind, type) and issubclass(kind, SmeltError)
    error = kind(failure.message) if known else SmeltError(failure.message)
    if isinstance(error, InvalidInput):
        error.param = failure.param
    elif isinstance(error, Unavailable) and failure.retry_after_s is not None:
        error.retry_after_s = failure.retry_after_s
    return error


def is_of_the_user(failure: Failure) -> bool:
    """Whether who asked has to ask for something else; otherwise it was our fault, or that of the moment."""
    return isinstance(error_of(failure), OF_THE_USER)
