"""The second schema: API keys with limits of their own. Frozen: later steps change it."""

from alembic.operations import Operations
from sqlalchemy import Column, Integer


def upgrade(op: Operations) -> None:
    """Give keys their limits; none for those that exist."""
    op.add_column("keys", Column("requests_per_minute", Integer))
    op.add_column("keys", Column("max_concurrent", Integer))
