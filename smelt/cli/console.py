"""The terminal that progress is shown on: one console, so that several live displays stack instead of fighting."""

from functools import cache

from rich.console import Console


@cache
def progress_console() -> Console:
    """Standard error, so that standard output stays clean for text and tables."""
    return Console(stderr=True)
