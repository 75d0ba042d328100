"""Pictures of the reports: ``python docs/screenshots/make.py RUN BASE``.

Opens the pages and the terminal output in Chromium (``apt-get install chromium``, ``pip install playwright``) and
writes PNG files beside this script: the summary of RUN on a terminal, its page, and its comparison with the run BASE.
"""

from __future__ import annotations

import argparse
import io
import tempfile
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright
from rich.console import Console

from helixbench.records import load_record
from helixbench.reference_server.run_log import RunLog
from helixbench.reports.compare.compare import compare
from helixbench.reports.render.document import Document
from helixbench.reports.render.html import html_page
from helixbench.reports.render.summaries import run_summary
from helixbench.reports.render.terminal import draw

HERE = Path(__file__).parent
CHROMIUM = "/usr/bin/chromium"


def main() -> None:
    """Read the records and write the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("base", type=Path)
    options = parser.parse_args()
    run, base = load_record(options.run, RunLog), load_record(options.base, RunLog)
    comparison = compare(base, run, base_name=options.base.name, new_name=options.run.name)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        photograph_page(browser, html_page(run), HERE / "report-desktop.png")
        page = html_page(run, comparison=comparison, base=base)
        photograph_page(browser, page, HERE / "comparison-desktop.png", height=1000)
        photograph_terminal(browser, run_summary(run), HERE / "terminal-run.png")
        browser.close()


def photograph_page(browser: Browser, content: str, path: Path, *, height: int | None = None) -> None:
    """The whole page, or its upper ``height`` pixels."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "report.html"
        file.write_text(content, encoding="utf-8")
        page = browser.new_page(viewport={"width": 1180, "height": height or 900})
        page.goto(file.as_uri())
        page.wait_for_timeout(300)
        page.screenshot(path=path, full_page=height is None)
        page.close()


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
