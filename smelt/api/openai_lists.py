"""What OpenAI's lists have in common: pages, and the texts that people attach; knows nothing of what is listed."""

from collections.abc import Callable, Sequence
from typing import Annotated, Generic, Literal, TypeVar

from pydantic import BaseModel, Field

# Texts of a client's own, which come back as they were.
Metadata = (
    Annotated[dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)]
    | None
)

T = TypeVar("T")
R = TypeVar("R")


class Listing(BaseModel, Generic[T]):
    """One page. The next one begins behind `last_id`, which a client sends as `after`."""

    object: Literal["list"] = "list"
    data: list[T]
    first_id: str | None
    last_id: str | None
    has_more: bool


def listing(found: Sequence[R], limit: int, shown: Callable[[R], T], id_of: Callable[[T], str]) -> Listing[T]:
    """The page with so many of what was found, of which there is one more where there is another page."""
    data = [shown(each) for each in found[:limit]]
    ids = [id_of(each) for each in data]
    return Listing(
        data=data, first_id=ids[0] if ids else None, last_id=ids[-1] if ids else None, has_more=len(found) > limit
    )
