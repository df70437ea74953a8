"""The HTML report: what it is made of, and what it does in a real browser (skipped where there is no Chromium)."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("vl_convert")
import tiny_llama

import int8pass
from int8pass.inspect.facts import RefusedLinear
from int8pass.inspect.html import render

FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SITE = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def report() -> int8pass.Report:
    torch._dynamo.reset()
    generator = torch.Generator().manual_seed(0)
    batches = [{"input_ids": torch.randint(0, 256, (1, 24), generator=generator), "use_cache": False} for _ in range(2)]
    return int8pass.inspect(tiny_llama.model(2), batches[0], data=batches)


@pytest.fixture(scope="module")
def page_file(report: int8pass.Report, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("html") / "report.html"
    report.save(path)
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    api = pytest.importorskip("playwright.sync_api")
    with api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield launched
        launched.close()


@pytest.fixture
def page(browser: Any, page_file: Path) -> Iterator[Any]:
    """The page, loaded; at the end: no error, no warning, no request but for the file itself."""
    opened = browser.new_page(viewport={"width": 1400, "height": 900})
    said, asked = [], []
    opened.on("console", lambda message: said.append(message.text))
    opened.on("pageerror", lambda error: said.append(str(error)))
    opened.on("request", lambda request: asked.append(request.url))
    opened.goto(page_file.as_uri())
    opened.wait_for_selector("html[data-ready]")
    yield opened
    opened.wait_for_timeout(100)
    assert not said
    assert [url for url in asked if not url.startswith(("data:", "blob:"))] == [page_file.as_uri()]
    opened.close()


def shot(page: Any, name: str) -> None:
    """Keep a screenshot where INT8PASS_SCREENSHOTS says."""
    if folder := os.environ.get("INT8PASS_SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"{name}.png")


def test_the_file_is_one_file(page_file: Path) -> None:
    text = page_file.read_text()
    assert len(text) < 5e6
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=\"(?!data:)", text)
    assert "</html>" in text


def test_text_of_the_model_cannot_become_markup() -> None:
    linear = RefusedLinear("</script><b>", "<img src=x>", "")
    report = int8pass.Report("<i>", 0, (), (linear,), settings={"model": "<script>alert(1)</script>"})
    text = render(report)
    assert "<script>alert" not in text
    assert "<img src=x>" not in text


def test_tables_sort_search_and_filter(page: Any, report: int8pass.Report) -> None:
    names = lambda: page.locator("#sites-table tbody tr td:first-child").all_inner_texts()  # noqa: E731
    assert names() == [site.name for site in report.sites]
    page.get_by_role("button", name="final dB").click()
    worst = sorted(report.sites, key=lambda s: s.errors.final)
    assert names()[0] == worst[0].name
    assert page.locator('#sites-table th[aria-sort="ascending"]').count() == 1
    page.get_by_role("button", name="final dB").press("Enter")
    assert names()[0] == worst[-1].name
    page.get_by_label("search sites", exact=True).fill("layers.1 down")
    assert names() == [SITE]
    page.get_by_label("search sites", exact=True).fill("")
    page.get_by_label("filter by patterns").select_option("gate product")
    assert names() == [name for name in (s.name for s in worst[::-1]) if "down_proj" in name]
    assert "lm_head" in page.locator("#refused-table").inner_text()
    shot(page, "sites")


def test_the_graph_switches_stages_opens_modules_and_shows_nodes(page: Any) -> None:
    page.get_by_role("tab", name="Graph").click()
    page.locator('[data-module="model.layers.1"]').focus()
    page.keyboard.press("Enter")
    page.locator('[data-module="model.layers.1.mlp"]').press("Enter")
    badges = page.locator(".badge")
    assert badges.count() >= 2
    assert re.match(r"Q/DQ \d+\.\d dB", badges.first.text_content())
    badges.first.press("Enter")
    assert "local SQNR" in page.locator("#details").inner_text()
    page.get_by_label("Find").fill("linear_13")
    page.get_by_label("Find").press("Enter")
    shot(page, "graph")
    for stage in ("captured", "normalized", "smoothed", "quantized", "fused"):
        page.get_by_label(stage, exact=True).check()
        page.wait_for_timeout(50)
        assert page.locator(".box").count() > 3
        assert page.locator(f'#canvas svg[aria-label="graph, {stage}"]').count() == 1
    page.get_by_label("Find").fill("linear_w8a8")
    page.get_by_label("Find").press("Enter")
    page.locator(".row.chosen").press("Enter")
    details = page.locator("#details").inner_text()
    assert "linear_w8a8" in details
    assert "modeling_llama.py" in details
    assert "Before (captured)" in details
    assert "implementation" in details
    page.get_by_role("button", name="Collapse").click()
    assert page.locator('[data-module="model.layers.1"].module').count() == 1
    shot(page, "fused")


def test_every_tab_has_its_charts(page: Any) -> None:
    expected = {"Channels": 5, "Error by depth": 2, "What ran": 1, "Schemes": 1}
    for tab, charts in expected.items():
        page.get_by_role("tab", name=tab).click()
        page.wait_for_function(
            f"document.querySelectorAll('[role=tabpanel]:not([hidden]) svg.marks').length >= {charts}"
        )
        shot(page, tab.split()[0].lower())
    page.get_by_role("tab", name="Channels").click()
    page.locator("#site-choice").select_option(SITE)
    assert "gate" not in page.locator("#site-facts").inner_text().split("scheme")[0]
    page.get_by_role("tab", name="Outliers").click()
    assert "channels reach |x| ≥ 6 somewhere" in page.locator("#outlier-note").inner_text()


def test_what_ran_leads_to_the_graph(page: Any, report: int8pass.Report) -> None:
    page.get_by_role("tab", name="What ran").click()
    assert "compiled by Inductor, under torch.profiler" in page.locator("#runtime-note").inner_text()
    page.get_by_label("filter by implementations").select_option(report.sites[0].implementations[0])
    link = page.locator("#runtime-table a[href='#graph']").first
    name = link.inner_text()
    link.click()
    assert page.get_by_label("fused", exact=True).is_checked()
    details = page.locator("#details").inner_text()
    assert name in details
    assert re.search(r"ran\s+\S+: \d+\.\d+ ms", details)
    shot(page, "node")
    page.get_by_role("button", name="Collapse").click()
    assert page.evaluate("anythingIn(view.box)"), "there is something in view"


def test_keyboard_and_theme(page: Any) -> None:
    page.get_by_role("tab", name="Sites").focus()
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.id") == "tab-graph"
    light = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.get_by_label("switch between light and dark").press("Enter")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != light
    shot(page, "dark")
