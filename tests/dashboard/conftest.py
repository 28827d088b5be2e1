"""Pages in Chromium."""

from browsing import browser, site, visit

__all__ = ["browser", "site", "visit"]
