"""Uploads in parts as rows: how many there are, what one holds, how they end; knows no file.

Pure SQL.
"""

from sqlalchemy import Connection, delete, func, select, update

from smelt.storage.tables import chunked_uploads, upload_parts

PENDING, COMPLETED, CANCELLED, EXPIRED = "pending", "completed", "cancelled", "expired"


def num_pending(connection: Connection, owner: str, now: float) -> int:
    """How many uploads of an owner may still get parts."""
    is_pending = (chunked_uploads.c.state == PENDING, chunked_uploads.c.expires > now)
    query = select(func.count()).where(chunked_uploads.c.owner == owner, *is_pending)
    return int(connection.execute(query).scalar_one())


def held(connection: Connection, upload_id: str) -> tuple[int, int]:
    """How many parts an upload has, and how many bytes they have together."""
    query = select(func.count(), func.coalesce(func.sum(upload_parts.c.num_bytes), 0))
    num_parts, num_bytes = connection.execute(query.where(upload_parts.c.upload_id == upload_id)).one()
    return int(num_parts), int(num_bytes)


def remove_parts(connection: Connection, upload_id: str) -> None:
    """Forget the parts of an upload that has ended."""
    connection.execute(delete(upload_parts).where(upload_parts.c.upload_id == upload_id))


def expire(connection: Connection, now: float, kept_s: float) -> None:
    """End uploads whose time is over, whoever owns them, and forget those for which it was over so long ago."""
    is_over = chunked_uploads.c.state == PENDING, chunked_uploads.c.expires <= now
    over = select(chunked_uploads.c.id).where(*is_over)
    connection.execute(delete(upload_parts).where(upload_parts.c.upload_id.in_(over)))
    connection.execute(update(chunked_uploads).where(*is_over).values(state=EXPIRED))
    connection.execute(delete(chunked_uploads).where(chunked_uploads.c.expires <= now - kept_s))
