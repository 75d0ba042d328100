"""Commands that read what the others wrote: ``report``, ``gate`` and ``demo``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from profiler.errors import InputError

if TYPE_CHECKING:
    import msgspec
    from rich.console import RenderableType

    from .verdict import Band

RecordFile = Annotated[Path, typer.Argument(help="run.json; also plan.json or cluster.json", show_default=False)]
RunFile = Annotated[Path, typer.Argument(help="run.json", show_default=False)]
PlanFile = Annotated[Path | None, typer.Option("--plan", help="refuse a run of another plan than this file's")]
MinRatio = Annotated[float, typer.Option(help="least measured / expected")]
MaxRatio = Annotated[float, typer.Option(help="most measured / expected")]
AsJson = Annotated[bool, typer.Option("--json", help="print the record on stdout, everything else on stderr")]


def mount(app: typer.Typer) -> None:
    """Register the commands."""
    app.command("report")(report_command)
    app.command("gate")(gate_command)
    app.command("demo")(demo_command)


def report_command(
    record: RecordFile,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="write one self-contained page")] = None,
    markdown: Annotated[Path | None, typer.Option(metavar="FILE", help="write a pull-request comment")] = None,
    plan: PlanFile = None,
    as_json: AsJson = False,
) -> None:
    """Show a run against its plan; a plan or a cluster as it stands."""
    from profiler.records import save_bytes

    from . import loading

    loaded = loading.load_any(record)
    if plan is not None:
        loading.require_plan(loaded, plan, origin=record)
    show(loading.summary(loaded), to_stderr=as_json)
    if html is not None:
        from .html import html_page

        save_bytes(html, html_page(loaded).encode())
        note(f"wrote {html}")
    if markdown is not None:
        from .markdown import markdown_comment

        save_bytes(markdown, markdown_comment(loaded).encode())
        note(f"wrote {markdown}")
    if as_json:
        print_record(loading.answer(loaded))


def gate_command(
    run: RunFile,
    min_ratio: MinRatio = 0.85,
    max_ratio: MaxRatio = 1.05,
    plan: PlanFile = None,
    as_json: AsJson = False,
) -> None:
    """Pass where measured / expected is inside the band: exit 0 passed, 1 failed, 2 bad input, 3 could not measure."""
    from . import loading
    from .gate import gate

    band = _band(min_ratio, max_ratio)
    log = loading.load_run(run)
    if plan is not None:
        loading.require_plan(log, plan, origin=run)
    result = gate(log, min_ratio=band.min_ratio, max_ratio=band.max_ratio)
    if as_json:
        print_record(result.verdict)
    word = {0: "PASS", 1: "FAIL", 3: "COULD NOT MEASURE"}[result.exit_code]
    typer.echo(f"{word}  {result.message}", err=as_json)
    raise typer.Exit(result.exit_code)


def demo_command(
    model: Annotated[
        str | None, typer.Option(help="Hugging Face directory or hub id; default: a small one is made")
    ] = None,
    testbed: Annotated[Path | None, typer.Option(help="testbed TOML; default: four nodes on this machine")] = None,
    out: Annotated[Path, typer.Option(help="folder of everything that is made")] = Path("helixbench-out"),
    as_json: AsJson = False,
) -> None:
    """The whole chain on this machine: profile, solve, serve under load, report."""
    from .demo import DemoConfig, run_demo

    raise typer.Exit(run_demo(DemoConfig(model=model, testbed=testbed, out=out, is_json=as_json)))


def show(renderable: RenderableType, *, to_stderr: bool = False) -> None:
    """Print once, no live redraw; in ASCII where the terminal cannot show more."""
    from rich.console import Console

    from .figures import to_ascii

    stream = sys.stderr if to_stderr else sys.stdout
    console = Console(file=stream, highlight=False, soft_wrap=False)
    if console.encoding.lower().startswith("utf"):
        console.print(renderable)
        return
    with console.capture() as captured:
        console.print(renderable)
    stream.write(to_ascii(captured.get()))


def print_record(record: msgspec.Struct) -> None:
    """A record as JSON on stdout."""
    from profiler.records import encode_record

    sys.stdout.write(encode_record(record).decode())


def note(text: str) -> None:
    """Progress, on stderr."""
    typer.echo(text, err=True)


def _band(min_ratio: float, max_ratio: float) -> Band:
    from .verdict import Band

    try:
        return Band(min_ratio=min_ratio, max_ratio=max_ratio)
    except ValueError as error:
        raise InputError(f"--min-ratio {min_ratio:g} --max-ratio {max_ratio:g}: {error}") from error
