"""Pictures of the reports: ``python docs/screenshots/make.py RUN [--plan PLAN] [--cluster CLUSTER] [--base BASE]``.

Opens the pages and the terminal output in Chromium (``apt-get install chromium``, ``pip install playwright``) and
writes PNG files beside this script: the terminal summaries, and the page on a desktop, on a phone and in dark mode;
with ``--base`` also the comparison of RUN with that run.
"""

from __future__ import annotations

import argparse
import io
import tempfile
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright
from rich.console import Console

from helixbench.profiler.cluster import ClusterProfile
from helixbench.records import load_record
from helixbench.reference_server.run_log import RunLog
from helixbench.reports.compare.compare import compare
from helixbench.reports.render.comparisons import comparison_summary
from helixbench.reports.render.document import Document
from helixbench.reports.render.html import html_page
from helixbench.reports.render.summaries import plan_summary, profile_summary, run_summary
from helixbench.reports.render.terminal import draw
from helixbench.solver.problem.plan import Plan

HERE = Path(__file__).parent
CHROMIUM = "/usr/bin/chromium"
DESKTOP, PHONE = {"width": 1180, "height": 900}, {"width": 390, "height": 3 * 844}


def main() -> None:
    """Read the records and write the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--plan", type=Path)
    parser.add_argument("--cluster", type=Path)
    parser.add_argument("--base", type=Path)
    parser.add_argument("--out", type=Path, default=HERE)
    arguments = parser.parse_args()
    run = load_record(arguments.run, RunLog)
    summaries: dict[str, Document] = {"terminal-run": run_summary(run)}
    cluster = load_record(arguments.cluster, ClusterProfile) if arguments.cluster else None
    if cluster is not None:
        summaries["terminal-profile"] = profile_summary(cluster)
    if arguments.plan:
        summaries["terminal-plan"] = plan_summary(load_record(arguments.plan, Plan), cluster)
    comparison = ""
    if arguments.base:
        base = load_record(arguments.base, RunLog)
        found = compare(base, run, base_name=str(arguments.base), new_name=str(arguments.run))
        summaries["terminal-comparison"] = comparison_summary(found)
        comparison = html_page(run, comparison=found, base=base)
    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as folder:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = Path(folder) / "report.html"
        page.write_text(html_page(run), encoding="utf-8")
        photograph_page(browser, page, arguments.out, "report")
        if comparison:
            page.write_text(comparison, encoding="utf-8")
            photograph_page(browser, page, arguments.out, "comparison")
        for name, summary in summaries.items():
            photograph_terminal(browser, summary, arguments.out / f"{name}.png")
        browser.close()


def photograph_page(browser: Browser, page_file: Path, out: Path, stem: str) -> None:
    """The whole page, light and dark; on a phone the first three screens."""
    for name, viewport, scheme in (
        ("desktop", DESKTOP, "light"),
        ("dark", DESKTOP, "dark"),
        ("phone", PHONE, "light"),
    ):
        context = browser.new_context(viewport=viewport, color_scheme=scheme)
        page = context.new_page()
        page.goto(page_file.as_uri())
        page.wait_for_timeout(300)
        page.screenshot(path=out / f"{stem}-{name}.png", full_page=viewport is DESKTOP)
        context.close()


def photograph_terminal(browser: Browser, summary: Document, path: Path) -> None:
    """The document on an 80-column terminal."""
    console = Console(file=io.StringIO(), width=80, force_terminal=True, record=True, highlight=False)
    console.print(draw(summary))
    template = (
        '<body style="margin:0;background:#fbfbf9;color:#1c1f23"><pre id="t" style="display:inline-block;margin:0;'
        "padding:18px 22px;font:14px/1.32 'DejaVu Sans Mono',monospace\">{code}</pre></body>"
    )
    page = browser.new_page(viewport={"width": 900, "height": 600}, device_scale_factor=1.5)
    page.set_content(console.export_html(code_format=template, inline_styles=True))
    page.locator("#t").screenshot(path=path)
    page.close()


if __name__ == "__main__":
    main()
