"""The pages of sessions, driven in Chromium: models in training as they learn, on a phone too."""

from typing import Any

import httpx
import pytest
from playwright.sync_api import Page, expect

from browsing import PHONE, Site, Visit, wait_until
from noted_session import NotedSession

pytestmark = pytest.mark.slow

LIVE_MS = 5000


def start_session(site: Site, name: str) -> NotedSession:
    """A session with one model in training, to which a test does what it wants."""
    asked: dict[str, Any] = {"tags": [], "user_metadata": {}, "sdk_version": "0.38.0", "display_name": name}
    made = httpx.post(f"{site.url}/api/v1/create_session", json=asked).raise_for_status().json()
    asked = {"session_id": made["session_id"], "model_seq_id": 0, "base_model": "tiny", "lora_config": {"rank": 8}}
    made = httpx.post(f"{site.url}/api/v1/create_model", json=asked).raise_for_status().json()
    return NotedSession(site.services.post_training.figures, made["model_id"])


def learn(session: NotedSession, num_steps: int, first: int = 1) -> None:
    for number in range(first, first + num_steps):
        session.figures.tell(session.lane, {"reward": number / 10})
        session.sample(session.lane)
        session.loss(16 / number)
        session.step()


def wait_for_points(page: Page, num_points: int) -> None:
    expression = f"document.querySelector('[data-part=chart]')?.data?.[1].x.length === {num_points}"
    wait_until(page, lambda: bool(page.evaluate(f"Boolean({expression})")))


def test_the_list_shows_sessions_and_what_their_models_come_to(site: Site, visit: Visit) -> None:
    page = visit.open("/dashboard/sessions")
    expect(page.get_by_text("Nothing has been trained by request yet")).to_be_visible()
    session = start_session(site, "first <b>talk</b>")
    row = page.get_by_role("row").filter(has_text="first <b>talk</b>")
    expect(row).to_contain_text("Rank 8 on tiny", timeout=LIVE_MS)
    expect(row).to_contain_text("Active")
    learn(session, 4)
    expect(row).to_contain_text("1.0000", timeout=LIVE_MS)  # 16 / 4 over 4 tokens
    expect(row).to_contain_text("0.4")
    expect(row.locator("svg polyline")).to_have_count(1)
    start_session(site, "second")
    expect(page.locator("tbody th a")).to_have_text(["second", "first <b>talk</b>"], timeout=LIVE_MS)
    page.get_by_role("link", name="first").click()
    wait_for_points(page, 4)


def test_the_curves_of_a_session_move_while_it_trains(site: Site, visit: Visit) -> None:
    session = start_session(site, "live")
    learn(session, 3)
    page = visit.open(f"/dashboard/sessions/{session.lane.partition(':')[0]}")
    wait_for_points(page, 3)
    learn(session, 2, first=4)
    wait_for_points(page, 5)
    expect(page.locator("[data-part=step]")).to_have_text("5", timeout=LIVE_MS)
    expect(page.locator("[data-part=loss]")).to_have_text("0.8000")
    expect(page.locator("[data-part=reward]")).to_have_text("0.5")
    expect(page.locator("[data-part=summary]")).to_have_text("Loss from 4.0000 to 0.8000; reward from 0.1 to 0.5.")
    told = page.evaluate("document.querySelector('[data-part=told-chart]').data.map(curve => [curve.name, curve.y])")
    assert told == [["reward", [0.1, 0.2, 0.3, 0.4, 0.5]]]
    page.get_by_text("The figures as a table").click()
    cells = page.locator("tbody tr").last.locator("td")
    expect(cells).to_contain_text(["5", "0.8000", "0.5", "0.5", "2", "2", "2", "-2"])


def test_an_unknown_session_says_so(visit: Visit) -> None:
    visit.refusals = (404,)
    page = visit.open("/dashboard/sessions/none")
    expect(page.get_by_role("alert")).to_contain_text("none")


@pytest.mark.parametrize("visit", [PHONE], indirect=True)
def test_a_phone_needs_no_scrolling_sideways(site: Site, visit: Visit) -> None:
    session = start_session(site, "a session with a name that is much longer than a phone is wide " + "x" * 60)
    learn(session, 20)
    for path, is_there in (("", "tbody tr"), (f"/{session.lane.partition(':')[0]}", "[data-part=chart] .main-svg")):
        page = visit.open(f"/dashboard/sessions{path}")
        expect(page.locator(is_there).first).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["viewport"]["width"]
