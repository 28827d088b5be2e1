"""The pages as people use them, driven in Chromium: live curves, a streaming playground, phone, dark, keyboard."""

import os
import re
import shutil
import subprocess
import sys

import pytest
from playwright.sync_api import Browser, expect

from browsing import DESKTOP, LIVE_MS, PHONE, Site, Visit, wait_for_chart, wait_until
from classifiers import save_small_classifier
from gated import make_key
from holding import write_source
from smelt.configs import RUN_METRICS
from smelt.errors import InvalidInput
from smelt.types import SamplingParams

pytestmark = pytest.mark.slow
PATHS = [
    *("/dashboard", "/dashboard/runs/{run}", "/dashboard/datasets", "/dashboard/playground"),
    *("/dashboard/models", "/dashboard/sessions"),
]


def test_the_list_shows_runs_as_they_start_move_and_end(site: Site, visit: Visit) -> None:
    page = visit.open("/dashboard")
    expect(page.get_by_text("Nothing has been trained yet")).to_be_visible()
    run = site.start_run("first")
    row = page.get_by_role("row").filter(has_text="first")
    expect(row).to_contain_text("Running", timeout=LIVE_MS)
    run.train(10)
    expect(row).to_contain_text("10 / 200", timeout=LIVE_MS)
    expect(row).to_contain_text("0.4000")
    expect(row.locator("svg polyline")).to_have_count(1)
    run.end({"kind": "failure", "message": "the loss became nan"})
    expect(row).to_contain_text("Failed", timeout=LIVE_MS)
    site.start_run("second")
    names = page.locator("tbody th a")
    expect(names).to_have_text(["second", "first"], timeout=LIVE_MS)
    shutil.rmtree(run.out_dir)
    expect(names).to_have_text(["second"], timeout=LIVE_MS)


def test_the_curves_of_a_run_move_while_it_trains(site: Site, visit: Visit) -> None:
    run = site.start_run("live")
    run.train(3)
    page = visit.open(f"/dashboard/runs/{run.id}")
    wait_for_chart(page, "[1].x.length === 3")
    run.train(2)
    run.evaluate(0.75)
    wait_for_chart(page, "[1].x.length === 5", LIVE_MS)
    wait_for_chart(page, "[2].y[0] === 0.75", LIVE_MS)
    expect(page.locator("#loss")).to_have_text("0.8000")
    expect(page.locator("#val-loss")).to_have_text("0.7500")
    expect(page.locator("#tokens-per-second")).to_have_text("1,234")
    expect(page.locator("#seconds-left")).to_have_text("1 min 37 s")
    expect(page.locator("#progress-label")).to_have_text("Step 5 of 200 (2%)")
    expect(page.locator("#log")).to_contain_text("step 5 is done")
    assert page.locator("#loss-chart .scatterlayer path.js-line").count() == 3
    run.end({"kind": "summary", "stop_reason": "done"})
    expect(page.locator("#state")).to_have_text("Succeeded", timeout=LIVE_MS)


def test_a_run_shows_its_config_its_command_and_its_figures_as_a_table(site: Site, visit: Visit) -> None:
    run = site.start_run("shown")
    run.train(4)
    run.evaluate(2.5)
    page = visit.open(f"/dashboard/runs/{run.id}")
    expect(page.locator("#config")).to_contain_text("max_iters: 200")
    expect(page.locator("#command-line")).to_contain_text("smelt train --max-iters 200 --out-dir")
    page.get_by_text("The figures of both charts as a table").click()
    rows = page.locator("#figures-table tbody tr")
    expect(rows).to_have_count(4)
    expect(rows.last.locator("td")).to_have_text(["4", "1.0000", "2.5000", "0.001", "1", "1,234"])
    run.train()
    expect(rows).to_have_count(5, timeout=LIVE_MS)


def test_a_run_that_goes_back_to_a_checkpoint_is_drawn_anew(site: Site, visit: Visit) -> None:
    run = site.start_run("resumed")
    run.train(10)
    page = visit.open(f"/dashboard/runs/{run.id}")
    wait_for_chart(page, "[1].x.length === 10")
    lines = (run.out_dir / RUN_METRICS).read_text().splitlines(keepends=True)
    (run.out_dir / RUN_METRICS).write_text("".join(lines[:4]))
    wait_for_chart(page, "[1].x.length === 4")
    run.num_steps = 4
    run.train()
    wait_for_chart(page, "[1].x.at(-1) === 5", LIVE_MS)


def test_a_failure_and_a_removed_run_are_told(site: Site, visit: Visit) -> None:
    run = site.start_run("doomed")
    page = visit.open(f"/dashboard/runs/{run.id}")
    for step in (1, 2):  # what came after the first must have come by the stream
        run.train()
        expect(page.locator("#log")).to_contain_text(f"step {step} is done")
    run.end({"kind": "failure", "message": "the loss became <b>nan</b>"})
    expect(page.locator("#reason")).to_have_text("the loss became <b>nan</b>")
    shutil.rmtree(run.out_dir)
    expect(page.get_by_role("alert")).to_have_text("This run's folder has been removed.")


def test_an_unknown_run_says_so(visit: Visit) -> None:
    visit.refusals = (404,)
    page = visit.open("/dashboard/runs/run-000000000000")
    expect(page.get_by_role("alert")).to_contain_text("there is no run 'run-000000000000'")


def test_the_playground_continues_a_text(site: Site, visit: Visit) -> None:
    page = visit.open("/dashboard/playground")
    page.get_by_label("Model").select_option("tiny")
    page.get_by_label("Temperature").fill("0")
    page.get_by_label("Seed").fill("7")
    page.get_by_label("Stop at").fill("END")
    page.get_by_label("Text to continue").fill("Once")
    page.keyboard.press("Enter")
    expect(page.locator(".turn p")).to_have_text("Once <b>word0</b> word1. <b>word2</b> word3. <b>word4</b>")
    expect(page.locator("#summary")).to_contain_text("5 tokens in")
    expect(page.locator("#spoken p")).to_have_count(4)
    (asked,) = site.models.asked
    assert (asked.model, asked.prompt) == ("tiny", "Once")
    assert asked.params == SamplingParams(max_tokens=200, temperature=0.0, top_p=1.0, seed=7, stop=("END",))


def test_the_playground_classifies_a_text(site: Site, visit: Visit) -> None:
    visit.refusals = (422,)
    save_small_classifier(site.services.settings.models / "news")
    page = visit.open("/dashboard/playground")
    expect(page.get_by_label("Model").locator("option").first).to_have_text("tiny")
    page.get_by_label("Classify a text").check()
    expect(page.get_by_label("Model").locator("option")).to_have_text(["news"])
    expect(page.get_by_label("Temperature")).to_be_hidden()
    page.get_by_label("Text to classify").fill("abcde")
    page.keyboard.press("Enter")
    rows = page.get_by_role("list", name="Probabilities").get_by_role("listitem")
    expect(rows).to_have_text(["long66.7 %", "short33.3 %"])
    expect(rows.first.get_by_role("meter")).to_have_js_property("value", 0.6667)
    (asked,) = site.models.classified
    assert (asked.model, asked.texts) == ("news", ("abcde",))
    page.get_by_label("Text to classify").fill(" ")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("only white space")
    page.get_by_label("Chat").check()
    expect(page.get_by_label("Model").locator("option").first).to_have_text("tiny")


def test_a_model_is_asked_by_its_alias_and_sliders_set_what_it_is_asked_for(site: Site, visit: Visit) -> None:
    page = visit.open("/dashboard/playground")
    names = page.get_by_label("Model").locator("option")
    expect(names).to_have_text(["tiny", "default (tiny)", "gpt (tiny)"])
    page.get_by_label("Model").select_option("gpt")
    for name, value in (("max-tokens", "300"), ("temperature", "0.5"), ("top-k", "50"), ("top-p", "0.9")):
        page.locator(f"input[data-for={name}]").fill(value)
        expect(page.locator(f"#{name}")).to_have_value(value)
    page.get_by_label("Top k").fill("40")
    expect(page.locator("input[data-for=top-k]")).to_have_value("40")
    page.get_by_label("Text to continue").fill("Once")
    page.keyboard.press("Enter")
    expect(page.locator("#summary")).to_contain_text("5 tokens in")
    (asked,) = site.models.asked
    assert asked.model == "tiny"
    assert asked.params == SamplingParams(max_tokens=300, temperature=0.5, top_k=40, top_p=0.9)


def test_models_are_shown_loaded_and_unloaded(site: Site, visit: Visit) -> None:
    page = visit.open("/dashboard/models")
    row = page.get_by_role("row").filter(has_text="tiny")
    expect(row).to_contain_text("also default, gpt")
    expect(row).to_contain_text("here:1")
    unload = page.get_by_role("button", name="Unload tiny")
    unload.focus()
    page.keyboard.press("Enter")
    expect(page.locator("#status")).to_have_text("tiny is unloaded.")
    expect(row).to_contain_text("nobody")
    load = page.get_by_role("button", name="Load tiny", exact=True)
    expect(load).to_be_focused()
    load.click()
    expect(row).to_contain_text("here:1")
    page.get_by_role("link", name="tiny").click()
    expect(page.get_by_label("Model")).to_have_value("tiny")


def test_a_model_is_imported_from_the_page(site: Site, visit: Visit) -> None:
    visit.refusals = (400,)
    write_source(site.services.settings.runs / "done" / "best")
    page = visit.open("/dashboard/models")
    page.get_by_label("From").fill("runs/done")
    page.get_by_label("Name").fill("mine")
    page.keyboard.press("Enter")
    expect(page.get_by_role("list", name="Imports")).to_contain_text("mine from runs/done: done")
    expect(page.get_by_role("row").filter(has_text="mine")).to_contain_text("gpt2")
    page.get_by_label("From").fill("../elsewhere")
    page.get_by_label("Name").fill("other")
    page.get_by_role("button", name="Import").click()
    expect(page.get_by_role("alert")).to_contain_text("neither hf:ORG/NAME nor a path below the server's home folder")


def test_a_conversation_remembers_what_was_said(site: Site, visit: Visit) -> None:
    site.author.num_words = 1
    page = visit.open("/dashboard/playground")
    page.get_by_label("Chat").check()
    for text in ("Hello", "And then?"):
        page.get_by_label("Your message").fill(text)
        page.get_by_role("button", name="Send").click()
        expect(page.locator(".turn.user p").last).to_have_text(text)
        expect(page.locator("#summary")).to_contain_text("1 tokens in")
    roles = [(turn.role, turn.content) for turn in site.models.asked[-1].messages]
    assert roles == [("user", "Hello"), ("assistant", " <b>word0</b>"), ("user", "And then?")]


def test_an_answer_streams_and_can_be_stopped(site: Site, visit: Visit) -> None:
    site.author.num_words = 10_000
    page = visit.open("/dashboard/playground")
    page.get_by_label("Text to continue").fill("Once")
    page.keyboard.press("Enter")
    expect(page.locator(".turn p")).to_contain_text("word3")
    stop = page.get_by_role("button", name="Stop", exact=True)
    expect(stop).to_be_enabled()
    stop.click()
    expect(page.locator("#summary")).to_contain_text("you stopped it")
    expect(stop).to_be_disabled()
    expect(page.get_by_role("button", name="Send")).to_be_enabled()
    wait_until(page, lambda: site.models.num_running == 0)


def test_an_error_is_shown_and_the_message_is_kept(site: Site, visit: Visit) -> None:
    visit.refusals = (400,)
    site.author.problem = InvalidInput("model 'tiny' has no chat template")
    page = visit.open("/dashboard/playground")
    page.get_by_label("Chat").check()
    page.get_by_label("Your message").fill("Hello")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert").filter(has_text="no chat template")).to_be_visible()
    expect(page.get_by_label("Your message")).to_have_value("Hello")


def test_the_keyboard_alone_reaches_and_works_the_playground(site: Site, visit: Visit) -> None:
    page = visit.open("/dashboard")
    focus = "document.activeElement.textContent.trim()"
    page.keyboard.press("Tab")
    assert page.evaluate(focus) == "Skip to the content"
    reached = []
    for _ in range(6):
        page.keyboard.press("Tab")
        reached.append(page.evaluate(focus))
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    assert reached[:5] == ["smelt", "Runs", "Datasets", "Sessions", "Playground"]
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Enter")
    page.wait_for_url("**/dashboard/playground")
    expect(page.get_by_label("Text to continue")).to_be_focused()
    expect(page.get_by_label("Model")).to_have_value("tiny")
    page.keyboard.type("Once")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("more")
    page.keyboard.press("Enter")
    expect(page.locator("#summary")).to_contain_text("5 tokens")
    assert site.models.asked[0].prompt == "Once\nmore"
    tabs = [page.keyboard.press("Tab") or page.evaluate("document.activeElement.id") for _ in range(4)]
    assert tabs == ["send", "clear", "model", ""]  # the last is the group of radio buttons
    page.keyboard.press("ArrowDown")
    expect(page.get_by_label("Chat")).to_be_checked()


@pytest.mark.parametrize("visit", [PHONE], indirect=True)
@pytest.mark.parametrize("path", PATHS)
def test_a_phone_needs_no_scrolling_sideways(site: Site, visit: Visit, path: str) -> None:
    run = site.start_run("a-run-with-a-name-that-is-much-longer-than-a-phone-is-wide-" + "x" * 60)
    run.train(20)
    page = visit.open(path.format(run=run.id))
    expect(page.locator("#workers")).to_be_visible()
    if "runs/" in path:
        wait_for_chart(page, "[0].x.length === 20")
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["viewport"]["width"]
    small = "e => e.getBoundingClientRect().height < 24 && e.getBoundingClientRect().width < 24"
    assert page.locator("button:visible").evaluate_all(f"all => all.filter({small}).length") == 0


def luminance(color: tuple[float, ...]) -> float:
    parts = [part / 255 for part in color[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(text: str, ground: str) -> float:
    """The ratio that WCAG defines, of two CSS colours."""
    colors = [tuple(float(part) for part in re.findall(r"[\d.]+", color)) for color in (text, ground)]
    low, high = sorted(map(luminance, colors))
    return (high + 0.05) / (low + 0.05)


TEXTS_AND_GROUNDS = """() => {
  const seen = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const element = node.parentElement;
    if (!node.data.trim() || !element.checkVisibility() || element.closest(".unseen, .skip, button:disabled")) continue;
    let ground = element;
    const bare = (e) => getComputedStyle(e).backgroundColor === "rgba(0, 0, 0, 0)" && e !== document.documentElement;
    while (bare(ground)) ground = ground.parentElement;
    const style = getComputedStyle(element);
    const color = element instanceof SVGElement ? style.fill : style.color;
    seen.push([node.data.trim().slice(0, 40), color, getComputedStyle(ground).backgroundColor]);
  }
  return seen;
}"""


@pytest.mark.parametrize(
    "visit", [DESKTOP, {**DESKTOP, "color_scheme": "dark"}], indirect=True, ids=["in the light", "in the dark"]
)
@pytest.mark.parametrize("path", PATHS)
def test_all_text_stands_out_from_its_ground(site: Site, visit: Visit, path: str) -> None:
    run = site.start_run("coloured")
    run.train(20)
    site.start_run("broken").end({"kind": "failure", "message": "it broke"})
    page = visit.open(path.format(run=run.id))
    expect(page.locator("#workers")).to_be_visible()
    if "runs/" in path:
        wait_for_chart(page, "[0].x.length === 20")
    if path == "/dashboard":
        expect(page.locator(".state.failed")).to_be_visible()
    wait_until(page, lambda: len(page.evaluate(TEXTS_AND_GROUNDS)) > 10)  # some of it comes with a page's first answers
    seen = page.evaluate(TEXTS_AND_GROUNDS)
    assert [(text, color, ground) for text, color, ground in seen if contrast(color, ground) < 4.5] == []


def test_with_keys_a_browser_logs_in_may_post_and_logs_out(site: Site, browser: Browser) -> None:
    key = make_key(site.services, scopes=["training"])
    visit = Visit(browser.new_page(), site.url)
    page = visit.page
    wait_until(page, lambda: "/login?next=%2Fdashboard" in visit.open("/dashboard").url)  # the key is seen in a second
    page.get_by_label("API key").fill(key)
    page.keyboard.press("Enter")
    page.wait_for_url("**/dashboard")
    expect(page.get_by_text("Nothing has been trained yet")).to_be_visible()
    post = """async (body) => {
      const { request } = await import("/static/api.js");
      return (await request("/v1/runs", { method: "POST", body })).status;
    }"""
    assert page.evaluate(post, {"data_path": "builtin:pydoc"}) == 201
    expect(page.locator("tbody .state")).to_have_text("Queued", timeout=LIVE_MS)
    page.get_by_role("button", name="Log out").click()
    page.wait_for_url("**/login")
    visit.open("/dashboard")
    page.wait_for_url("**/login?next=%2Fdashboard")
    page.close()
    visit.check()


def test_a_training_of_a_terminal_is_seen_live(site: Site, visit: Visit) -> None:
    text = site.folder / "input.txt"
    text.write_text("".join(f"{number} is the number before {number + 1}.\n" for number in range(2000)))
    shape = ["--n-layer", "1", "--n-head", "2", "--n-embd", "16", "--block-size", "32", "--batch-size", "4"]
    pace = [
        "--max-time",
        "20",
        "--log-interval",
        "1",
        "--eval-interval",
        "20",
        "--eval-iters",
        "1",
        "--compile",
        "false",
    ]
    command = [sys.executable, "-m", "smelt", "train", "--data-path", str(text), "--tokenizer", "bytes"]
    page = visit.open("/dashboard")
    with subprocess.Popen(
        [*command, *shape, *pace, "--max-iters", "1000000", "--out-dir", str(site.folder / "seen")],
        env={**os.environ, "SMELT_HOME": str(site.services.settings.home)},
        stderr=subprocess.DEVNULL,
    ) as trainer:
        page.get_by_role("link", name="seen").click(timeout=60_000)
        wait_for_chart(page, "[2].x.length > 1", 60_000)
        before = page.evaluate("document.getElementById('loss-chart').data[1].x.at(-1)")
        wait_for_chart(page, f"[1].x.at(-1) > {before}", LIVE_MS)
        trainer.kill()
    expect(page.locator("#state")).to_have_text("Failed", timeout=LIVE_MS)
