"""The pages that start, stop and resume runs and make datasets, driven in Chromium."""

import json
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import expect

from browsing import Site, Visit
from smelt.control.run_folders import find_runs

pytestmark = pytest.mark.slow


def config_of_newest(site: Site) -> dict[str, Any]:
    """What the run has that was asked for last."""
    return find_runs(site.services.settings.runs)[0][0].config


def test_a_file_becomes_a_dataset_that_can_be_looked_at_and_trained_on(
    site: Site, visit: Visit, tmp_path: Path
) -> None:
    lines = "".join(json.dumps({"text": f"Line <b>{number}</b> of a file."}) + "\n" for number in range(60))
    (tmp_path / "lines.jsonl").write_text(lines)
    page = visit.open("/dashboard/datasets")
    expect(page.get_by_text("There is no dataset yet")).to_be_visible()
    page.get_by_label("Name").fill("lines")
    page.get_by_label("File").set_input_files(tmp_path / "lines.jsonl")
    page.get_by_label("Tokenizer").fill("bytes")
    page.get_by_role("button", name="Add").click()
    row = page.get_by_role("row").filter(has_text="lines.jsonl")
    expect(row).to_contain_text("Ready", timeout=30_000)
    page.get_by_role("button", name="Look lines").click()
    expect(page.locator("#documents li").first).to_contain_text("Line <b>0</b> of a file.")
    expect(page.locator("#rows-place")).to_have_text("Documents 1 to 10 of 54")
    page.get_by_role("button", name="Next").click()
    expect(page.locator("#rows-place")).to_have_text("Documents 11 to 20 of 54")
    page.get_by_label("Split").select_option("val")
    expect(page.locator("#rows-place")).to_have_text("Documents 1 to 6 of 6")

    visit.open("/dashboard")
    page.get_by_text("Start a run").click()
    page.get_by_label("dataset", exact=True).fill("lines")
    page.get_by_label("max_iters").fill("7")
    page.get_by_label("bias").select_option("false")
    page.get_by_role("button", name="Start", exact=True).click()
    expect(page.locator("#state")).to_have_text("Queued", timeout=15_000)
    config = config_of_newest(site)
    assert (config["dataset"], config["max_iters"], config["bias"]) == ("lines", 7, False)
    page.get_by_role("button", name="Cancel").click()
    expect(page.locator("#state")).to_have_text("Cancelled")

    visit.open("/dashboard/datasets")
    page.on("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Remove lines").click()
    expect(page.get_by_text("There is no dataset yet")).to_be_visible()


def test_a_dataset_that_fails_says_why(site: Site, visit: Visit, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("short")
    page = visit.open("/dashboard/datasets")
    page.get_by_label("Name").fill("short")
    page.get_by_label("File").set_input_files(tmp_path / "short.txt")
    page.get_by_label("Tokenizer").fill("bytes")
    page.get_by_role("button", name="Add").click()
    row = page.get_by_role("row").filter(has_text="short.txt")
    expect(row).to_contain_text("Failed", timeout=30_000)
    expect(row).to_contain_text("short.txt gives 6 tokens")
    page.on("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Remove short").click()
    expect(row).to_have_count(0)


def test_a_run_starts_from_yaml_and_is_cancelled_and_resumed_on_its_page(site: Site, visit: Visit) -> None:
    page = visit.open("/dashboard")
    page.get_by_text("Start a run").click()
    page.get_by_label("Or paste a config as YAML").fill("data_path: builtin:pydoc\nn_layer: 3\nmax_iters: 9\n")
    page.get_by_role("button", name="Start from YAML").click()
    expect(page.locator("#state")).to_have_text("Queued", timeout=15_000)
    assert (config_of_newest(site)["n_layer"], config_of_newest(site)["max_iters"]) == (3, 9)
    expect(page.get_by_role("button", name="Resume")).to_be_hidden()
    page.get_by_role("button", name="Cancel").click()
    expect(page.locator("#state")).to_have_text("Cancelled")
    page.get_by_role("button", name="Resume").click()
    expect(page.locator("#state")).to_have_text("Queued")
    out_dir = find_runs(site.services.settings.runs)[0][1]
    (out_dir / "checkpoints" / "step-00000003").mkdir(parents=True)
    (out_dir / "last").symlink_to("checkpoints/step-00000003")
    page.reload()
    expect(page.locator("#checkpoints tbody tr")).to_contain_text("step-00000003")
    expect(page.locator("#checkpoints tbody tr")).to_contain_text("last")


def test_what_is_wrong_with_a_run_stands_by_its_form(site: Site, visit: Visit) -> None:
    visit.refusals = (400,)
    page = visit.open("/dashboard")
    page.get_by_text("Start a run").click()
    page.get_by_label("Or paste a config as YAML").fill("n_layers: 3")
    with page.expect_response("**/v1/runs"):
        page.get_by_role("button", name="Start from YAML").click()
    expect(page.locator("#new-run-problem")).to_contain_text("unknown key 'n_layers'")
    page.get_by_label("Recipe").select_option("fine-tune")
    expect(page.get_by_label("lora_rank")).to_be_visible()
