"""Commands that read what the others wrote: ``report``, ``compare``, ``gate`` and ``demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from helixbench.reports.gate import cli as gate_cli
from helixbench.reports.options import AsJson, MarkdownFile, PlanFile, note, print_record, show
from helixbench.reports.suite import cli as suite_cli

RecordFile = Annotated[Path, typer.Argument(help="run.json; also plan.json or cluster.json", show_default=False)]


def mount(app: typer.Typer) -> None:
    """Register the commands."""
    app.command("report")(report_command)
    app.command("compare")(compare_command)
    gate_cli.mount(app)
    app.command("demo")(demo_command)
    app.command("validate")(suite_cli.validate_command)


def report_command(
    record: RecordFile,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="write one self-contained page")] = None,
    markdown: MarkdownFile = None,
    plan: PlanFile = None,
    as_json: AsJson = False,
) -> None:
    """Show a run against its plan; a plan or a cluster as it stands."""
    from helixbench.records import save_bytes
    from helixbench.reports import loading

    loaded = loading.load_any(record)
    if plan is not None:
        loading.require_plan(loaded, plan, origin=record)
    show(loading.summary(loaded), to_stderr=as_json)
    if html is not None:
        from helixbench.reports.render.html import html_page

        save_bytes(html, html_page(loaded).encode())
        note(f"wrote {html}")
    if markdown is not None:
        from helixbench.reports.render.markdown import markdown_comment

        save_bytes(markdown, markdown_comment(loaded).encode())
        note(f"wrote {markdown}")
    if as_json:
        print_record(loading.answer(loaded))


def compare_command(
    base: Annotated[Path, typer.Argument(show_default=False)],
    new: Annotated[Path, typer.Argument(show_default=False)],
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="write one self-contained page")] = None,
    markdown: MarkdownFile = None,
    as_json: AsJson = False,
) -> None:
    """What changed between two runs, two plans or two clusters, and whether it is more than noise."""
    from helixbench.records import save_bytes
    from helixbench.reports import loading
    from helixbench.reports.compare.compare import compare
    from helixbench.reports.compare.terminal import comparison_summary

    records = loading.load_any(base), loading.load_any(new)
    found = compare(*records, base_name=str(base), new_name=str(new))
    show(comparison_summary(found), to_stderr=as_json)
    if html is not None:
        from helixbench.reports.compare.html import comparison_page

        save_bytes(html, comparison_page(found, *records).encode())
        note(f"wrote {html}")
    if markdown is not None:
        from helixbench.reports.render.markdown import comparison_markdown, fit

        save_bytes(markdown, fit(comparison_markdown(found)).encode())
        note(f"wrote {markdown}")
    if as_json:
        print_record(found)


def demo_command(
    model: Annotated[
        str | None, typer.Option(help="Hugging Face directory or hub id; default: a small one is made")
    ] = None,
    testbed: Annotated[Path | None, typer.Option(help="testbed TOML; default: four nodes on this machine")] = None,
    out: Annotated[Path, typer.Option(help="folder of everything that is made")] = Path("helixbench-out"),
    as_json: AsJson = False,
) -> None:
    """The whole chain on this machine: profile, solve, serve under load, report."""
    from helixbench.reports.demo import DemoConfig, run_demo

    raise typer.Exit(run_demo(DemoConfig(model=model, testbed=testbed, out=out, is_json=as_json)))
