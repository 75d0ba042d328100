"""The pages in a real browser. Needs Chromium, which ``make test`` installs on Debian as root; skipped without it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from helixbench.profiler.cluster import ClusterProfile
from helixbench.reference_server.run_log import NodePoint, RunLog
from helixbench.reports.compare.compare import compare
from helixbench.reports.loading import Record
from helixbench.reports.render.html import html_page
from helixbench.reports.verdict.validate import validate
from helixbench.solver.problem.plan import LayerRange, Plan
from tests.reports.report_examples import example_plan, example_profile, example_run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")

SERIES = {"mid": tuple(NodePoint(float(i + 1), 8.0 if i % 5 else None, 100 * i, 0.5) for i in range(48))}
RUN = msgspec.structs.replace(example_run(), node_timeline=SERIES)
PAGES: dict[str, RunLog | Plan | ClusterProfile] = {
    "run": RUN,
    "plan": example_plan(),
    "cluster": example_profile(),
    "run that could not be measured": msgspec.structs.replace(RUN, requests=(), timeline=(), concurrency=3),
}
MOVED = msgspec.structs.replace(
    example_plan(), placement={**example_plan().placement, "small": LayerRange(0, 6), "big": LayerRange(6, 10)}
)
PAIRS: dict[str, tuple[Record, Record]] = {
    "two runs": (RUN, example_run(seed=1, speed=0.7)),
    "two plans": (example_plan(), MOVED),
    "two clusters": (example_profile(), msgspec.structs.replace(example_profile(), links=())),
    "run and empty run": (RUN, msgspec.structs.replace(RUN, requests=(), timeline=(), concurrency=3)),
}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


def open_page(browser: Browser, tmp_path: Path, name: str, *, width: int = 1180, scheme: str = "light") -> Page:
    """The page, after checking that it said nothing on the console and asked for nothing but itself."""
    file = tmp_path / "report.html"
    file.write_text(page_of(name), encoding="utf-8")
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(file.as_uri())
    page.wait_for_timeout(150)
    assert said == []
    assert [url for url in asked if not url.startswith("data:")] == [file.as_uri()]
    return page


def page_of(name: str) -> str:
    if name in PAGES:
        return html_page(PAGES[name])
    base, new = PAIRS[name]
    return html_page(new, comparison=compare(base, new, base_name="base.json", new_name="new.json"), base=base)


@pytest.mark.parametrize("name", [*PAGES, *PAIRS])
def test_a_page_opens_without_a_word_on_the_console(name: str, browser: Browser, tmp_path: Path) -> None:
    page = open_page(browser, tmp_path, name)

    assert page.locator("h1").inner_text()
    page.close()


def test_numbers_shown_are_the_records(browser: Browser, tmp_path: Path) -> None:
    page = open_page(browser, tmp_path, "run")
    verdict = validate(RUN)

    shown = float(page.locator("#row-measured td").first.get_attribute("data-value") or "nan")
    record = page.evaluate("JSON.parse(document.getElementById('record').textContent)")
    window = record["window"]
    counted = (record["prompt_tokens"] + record["output_tokens"]) / (window["end_s"] - window["start_s"])
    assert shown == counted == verdict.measured_tokens_per_s
    assert page.locator("#ratio-expected").inner_text() == f"{verdict.ratio_to_expected:.3f}"
    assert page.locator("#outcome").inner_text() == "As predicted"
    page.close()


def test_every_chart_is_drawn_and_has_words(browser: Browser, tmp_path: Path) -> None:
    page = open_page(browser, tmp_path, "run")

    charts = page.locator(".chart")
    assert charts.count() == 6
    for i in range(charts.count()):
        assert charts.nth(i).locator("canvas").count() == 1
        assert len(charts.nth(i).get_attribute("aria-label") or "") > 30
    page.close()


def test_a_table_sorts_by_its_numbers_both_ways(browser: Browser, tmp_path: Path) -> None:
    page = open_page(browser, tmp_path, "run")
    column = "#placement-table tbody tr td:nth-child(5)"

    for is_descending in (False, True):
        page.locator("#placement-table .sort", has_text="flow").click()
        flows = [float(cell.get_attribute("data-value") or "nan") for cell in page.locator(column).all()]
        assert flows == sorted([120.0, 280.0, 400.0], reverse=is_descending)
    page.close()


@pytest.mark.parametrize("name", ["run", *PAIRS])
def test_a_phone_never_scrolls_the_whole_page_sideways(name: str, browser: Browser, tmp_path: Path) -> None:
    page = open_page(browser, tmp_path, name, width=390)

    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.close()


def test_a_comparison_shows_its_numbers_and_the_latencies_of_both_runs(browser: Browser, tmp_path: Path) -> None:
    page = open_page(browser, tmp_path, "two runs")
    found = compare(*PAIRS["two runs"])

    assert page.locator("#change-table tbody tr").count() == sum(c.judgement != "unchanged" for c in found.changes)
    for change in found.changes:
        row = page.locator(f"#change-table tbody tr[data-name='{change.name}']")
        if change.judgement != "unchanged" and change.ratio is not None:
            assert float(row.locator("td.num[data-value]").get_attribute("data-value") or "nan") == change.ratio
            assert change.base in row.inner_text()
    for kind in ("ttft", "tpot"):
        assert page.locator(f"#{kind}-chart .u-legend .u-label").all_inner_texts() == ["seconds", "new", "base"]
    assert "worse" in page.locator("#headline-changes").inner_text()
    embedded = page.evaluate("JSON.parse(document.getElementById('comparison').textContent)")
    assert msgspec.convert(embedded, type(found)).changes == found.changes
    page.close()


def test_a_comparison_of_plans_draws_both_flows(browser: Browser, tmp_path: Path) -> None:
    page = open_page(browser, tmp_path, "two plans")

    assert page.locator("#change-table tr[data-name='layers of small'] td.text").all_inner_texts() == ["[0,8)", "[0,6)"]
    assert page.locator("svg.flow").count() == 2
    page.close()


def test_dark_is_dark(browser: Browser, tmp_path: Path) -> None:
    page = open_page(browser, tmp_path, "run", scheme="dark")

    red, green, blue = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    assert max(red, green, blue) < 60
    page.close()


def test_it_prints_to_pdf(browser: Browser, tmp_path: Path) -> None:
    page = open_page(browser, tmp_path, "run")

    pdf = page.pdf(format="A4")

    assert pdf.startswith(b"%PDF")
    assert len(pdf) > 20_000
    page.close()


def test_without_javascript_the_tables_still_tell_everything(browser: Browser, tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    file.write_text(html_page(RUN), encoding="utf-8")
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(file.as_uri())

    assert page.locator("#latency-table tbody tr").count() == 2
    assert page.locator("#timeline-table tbody tr").count() == 48
    context.close()
