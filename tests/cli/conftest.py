"""A ledger on SQLite, and a socket file for workers to dial."""

from spine import anyio_backend, ledger, socket_file

__all__ = ["anyio_backend", "ledger", "socket_file"]
