"""The command ``validate``: profile, solve and serve every case of a suite, and judge the predictions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from helixbench.errors import InputError
from helixbench.options import AsJson, note, print_record
from helixbench.reports.output import MarkdownFile, show, write


def validate_command(
    suite: Annotated[list[Path], typer.Option(metavar="FILE", help="suite TOML: testbeds, workloads, cases")],
    out: Annotated[Path, typer.Option("--output", "-o", help="folder for profiles, plans, runs and suite.json")] = Path(
        "helixbench-suite"
    ),
    repeats: Annotated[int, typer.Option(min=1, help="runs of each case, in turn with those of the others")] = 5,
    only: Annotated[list[str] | None, typer.Option(metavar="CASE", help="run only this case; repeatable")] = None,
    model: Annotated[str | None, typer.Option(help="model directory or hub id, instead of the suite's own")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="keep what is in the folder and still valid")] = False,
    allow_stale: Annotated[
        bool, typer.Option("--allow-stale", help="serve although device, versions or model differ from the profile's")
    ] = False,
    min_ratio: Annotated[float, typer.Option(help="lowest accepted measured / expected total tokens/s")] = 0.95,
    max_ratio: Annotated[float, typer.Option(help="highest accepted measured / expected total tokens/s")] = 1.05,
    tpot_tolerance: Annotated[float, typer.Option(help="accepted relative error of TPOT p50")] = 0.10,
    strict: Annotated[bool, typer.Option("--strict", help="exit 4 if repeats vary too much to decide")] = False,
    markdown: MarkdownFile = None,
    as_json: AsJson = False,
) -> None:
    """Compare measured with predicted performance on many testbeds and workloads.

    Exit 0 all ok, 1 a case is off, 2 invalid input, 3 could not measure, 4 inconclusive with --strict.
    """
    from helixbench.reports.render.markdown import markdown as draw_markdown
    from helixbench.reports.suite.child import INTERRUPTED
    from helixbench.reports.suite.file import load_suite
    from helixbench.reports.suite.judge import exit_code_of
    from helixbench.reports.suite.result import Tolerance
    from helixbench.reports.suite.run import SuiteOptions, run_suite
    from helixbench.reports.suite.summary import suite_summary
    from helixbench.reports.verdict.verdict import Band

    if len(suite) > 1:
        raise InputError(f"--suite: given {len(suite)} times; run one suite at a time, each with its own -o DIR")
    try:
        tolerance = Tolerance(band=Band(min_ratio=min_ratio, max_ratio=max_ratio), tpot=tpot_tolerance)
    except ValueError as error:
        raise InputError(f"--min-ratio, --max-ratio, --tpot-tolerance: {error}") from error
    options = SuiteOptions(
        out=out, repeats=repeats, tolerance=tolerance, resume=resume, model=model, allow_stale=allow_stale
    )
    result = run_suite(load_suite(suite[0], only=tuple(only or ())), options)
    shown = suite_summary(result)
    show(shown, to_stderr=as_json)
    if markdown is not None:
        write(markdown, draw_markdown(shown))
    if as_json:
        print_record(result)
    note(f"{'interrupted; ' if result.is_interrupted else ''}all files are in {out}; continue with --resume")
    raise typer.Exit(INTERRUPTED if result.is_interrupted else exit_code_of(result.cases, is_strict=strict))
