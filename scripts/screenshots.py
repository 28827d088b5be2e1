"""Pictures of a running server's pages for the documentation: in the light, in the dark, on a phone.

    python scripts/screenshots.py http://127.0.0.1:8000 RUN_ID

Takes them with the system's Chromium, by playwright, and writes docs/images/*.png.
"""

import argparse
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Page, expect, sync_playwright

IMAGES = Path(__file__).resolve().parent.parent / "docs" / "images"
DESKTOP: dict[str, Any] = {"viewport": {"width": 1100, "height": 760}}
DARK: dict[str, Any] = {**DESKTOP, "color_scheme": "dark"}
PHONE: dict[str, Any] = {"viewport": {"width": 390, "height": 900}, "is_mobile": True, "has_touch": True}
FLAGS = ["--no-sandbox", "--no-first-run", "--disable-background-networking", "--disable-component-update"]
PROMPT = "To be, or not"


def show_runs(page: Page, url: str, _run_id: str) -> None:
    """The list."""
    page.goto(f"{url}/dashboard")
    expect(page.locator("tbody tr").first).to_be_visible()


def show_run(page: Page, url: str, run_id: str) -> None:
    """One run with its curves."""
    page.goto(f"{url}/dashboard/runs/{run_id}")
    expect(page.locator("#loss-chart .scatterlayer path.js-line").first).to_be_visible()
    page.wait_for_timeout(1000)


def show_playground(page: Page, url: str, _run_id: str) -> None:
    """An answer that is there to its end."""
    page.goto(f"{url}/dashboard/playground")
    page.get_by_label("Seed").fill("1")
    page.get_by_label("Longest answer").fill("120")
    page.get_by_label("Text to continue").fill(PROMPT)
    page.keyboard.press("Enter")
    expect(page.locator("#summary")).to_contain_text("tokens in", timeout=60_000)


def show_models(page: Page, url: str, _run_id: str) -> None:
    """The models that are registered."""
    page.goto(f"{url}/dashboard/models")
    expect(page.locator("tbody tr").first).to_be_visible()


PICTURES: dict[str, tuple[Callable[[Page, str, str], None], dict[str, Any]]] = {
    "runs": (show_runs, {"viewport": {"width": 1100, "height": 430}}),
    "run": (show_run, DESKTOP),
    "run-dark": (show_run, DARK),
    "run-phone": (show_run, PHONE),
    "models": (show_models, {"viewport": {"width": 1100, "height": 560}}),
    "playground": (show_playground, DESKTOP),
    "playground-dark": (show_playground, DARK),
}


def take(browser: Browser, name: str, url: str, run_id: str) -> None:
    """One picture."""
    show, look = PICTURES[name]
    context = browser.new_context(**look)
    page = context.new_page()
    show(page, url, run_id)
    expect(page.locator("#workers")).to_be_visible()
    page.screenshot(path=IMAGES / f"{name}.png")
    context.close()


def main() -> None:
    """Take all pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="where the server is")
    parser.add_argument("run_id", help="the run whose page is shown")
    arguments = parser.parse_args()
    IMAGES.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        for name in PICTURES:
            take(browser, name, arguments.url, arguments.run_id)
        browser.close()


if __name__ == "__main__":
    main()
