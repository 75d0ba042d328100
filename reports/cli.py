"""Commands that read records: ``report``, ``compare``, ``gate``, ``validate``, ``demo`` and ``schema``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from helixbench.errors import InputError
from helixbench.options import AsJson, print_record
from helixbench.reports.demo.settings import DemoCluster
from helixbench.reports.gate import cli as gate_cli
from helixbench.reports.output import ClientBenchmark, ClientFile, HtmlFile, MarkdownFile, PlanFile, show, write
from helixbench.reports.schemas import SchemaName
from helixbench.reports.suite import cli as suite_cli

RecordFile = Annotated[Path, typer.Argument(help="run.json, plan.json or cluster.json", show_default=False)]


def mount(app: typer.Typer) -> None:
    """Register the commands."""
    app.command("report")(report_command)
    app.command("compare")(compare_command)
    gate_cli.mount(app)
    app.command("demo")(demo_command)
    app.command("validate")(suite_cli.validate_command)
    app.command("schema")(schema_command)


def report_command(
    record: RecordFile,
    html: HtmlFile = None,
    markdown: MarkdownFile = None,
    plan: PlanFile = None,
    client: ClientFile = None,
    client_benchmark: ClientBenchmark = None,
    as_json: AsJson = False,
) -> None:
    """Show a run beside its plan's prediction, or a plan or a cluster."""
    from helixbench.reference_server.run_log import RunLog
    from helixbench.reports import loading
    from helixbench.reports.render.html import html_page
    from helixbench.reports.render.markdown import markdown as draw_markdown
    from helixbench.reports.render.summaries import run_summary, summary
    from helixbench.reports.verdict.validate import validate

    loaded = loading.load_any(record)
    if plan is not None:
        loading.require_plan(loaded, plan, origin=record)
    other = loading.client_of_options(loaded, client, client_benchmark, origin=record)
    verdict = validate(loaded, client=other) if isinstance(loaded, RunLog) else None
    shown = run_summary(loaded, verdict) if isinstance(loaded, RunLog) else summary(loaded)
    show(shown, to_stderr=as_json)
    if html is not None:
        write(html, html_page(loaded, client=other))
    if markdown is not None:
        write(markdown, draw_markdown(shown))
    if as_json:
        print_record(loaded if verdict is None else verdict)


def compare_command(
    base: Annotated[Path, typer.Argument(show_default=False)],
    new: Annotated[Path, typer.Argument(show_default=False)],
    html: HtmlFile = None,
    markdown: MarkdownFile = None,
    as_json: AsJson = False,
) -> None:
    """Compare two runs, two plans or two clusters; changes are judged against the noise."""
    from helixbench.reports import loading
    from helixbench.reports.compare.compare import compare
    from helixbench.reports.render.comparisons import comparison_summary
    from helixbench.reports.render.html import html_page
    from helixbench.reports.render.markdown import markdown as draw_markdown

    before, after = loading.load_any(base), loading.load_any(new)
    found = compare(before, after, base_name=str(base), new_name=str(new))
    shown = comparison_summary(found)
    show(shown, to_stderr=as_json)
    if html is not None:
        write(html, html_page(after, comparison=found, base=before))
    if markdown is not None:
        write(markdown, draw_markdown(shown))
    if as_json:
        print_record(found)


def demo_command(
    cluster: Annotated[
        DemoCluster, typer.Option(help="which emulated cluster: two places, or a published one of 24 GPUs")
    ] = DemoCluster.TWO_PLACES,
    real: Annotated[bool, typer.Option("--real", help="this machine's own devices: its GPUs, or else its CPU")] = False,
    testbed: Annotated[Path | None, typer.Option(help="a testbed TOML of your own")] = None,
    model: Annotated[
        str | None, typer.Option(help="Hugging Face model directory or hub id (default: make a small one)")
    ] = None,
    out: Annotated[Path, typer.Option(help="folder for all files")] = Path("helixbench-out"),
    as_json: AsJson = False,
) -> None:
    """Profile, solve, serve the plan and two baselines under load, and report; on this machine.

    Without options the nodes are five emulated GPUs in two places.
    """
    from helixbench.reports.demo.demo import DemoConfig, run_demo
    from helixbench.reports.demo.settings import setting_of, setting_of_own_devices, setting_of_testbed

    if real and testbed is not None:
        raise InputError(f"--real: --testbed {testbed} names the devices; give one of them")
    if testbed is not None:
        setting = setting_of_testbed(testbed)
    else:
        setting = setting_of_own_devices(out) if real else setting_of(cluster)
    raise typer.Exit(run_demo(DemoConfig(setting=setting, model=model, out=out, is_json=as_json)))


def schema_command(record: Annotated[SchemaName, typer.Argument(help="which record", show_default=False)]) -> None:
    """Print the JSON Schema of a record."""
    from helixbench.reports.schemas import json_schema

    typer.echo(json_schema(record))
