"""The command ``validate``: the whole chain on every case of a suite, and the table of what held."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from helixbench.errors import InputError
from helixbench.reports.options import AsJson, MarkdownFile, note, print_record, show


def validate_command(
    suite: Annotated[list[Path], typer.Option(metavar="FILE", help="suite TOML: testbeds, workloads, cases")],
    out: Annotated[Path, typer.Option("--output", "-o", help="folder of profiles, plans, runs and suite.json")] = Path(
        "helixbench-suite"
    ),
    repeats: Annotated[int, typer.Option(min=1, help="runs of each case, in turn with those of the others")] = 5,
    only: Annotated[list[str] | None, typer.Option(metavar="CASE", help="run only this case; may be repeated")] = None,
    model: Annotated[str | None, typer.Option(help="directory or hub id, instead of the suite's own model")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="keep what is in the folder and still holds")] = False,
    allow_stale: Annotated[
        bool, typer.Option("--allow-stale", help="also where a kept profile is of another device, version or model")
    ] = False,
    min_ratio: Annotated[float, typer.Option(help="least measured / expected total tokens/s")] = 0.95,
    max_ratio: Annotated[float, typer.Option(help="largest measured / expected total tokens/s")] = 1.05,
    tpot_tolerance: Annotated[float, typer.Option(help="how far off TPOT p50 may be, as a share")] = 0.10,
    strict: Annotated[bool, typer.Option("--strict", help="exit 4 where repeats spread too far to decide")] = False,
    markdown: MarkdownFile = None,
    as_json: AsJson = False,
) -> None:
    """Run the chain on many testbeds and workloads, and hold what was measured against what was predicted.

    Exit 0 all ok, 1 a case is off, 2 bad input, 3 could not measure, 4 inconclusive with --strict.
    """
    from helixbench.records import save_bytes
    from helixbench.reports.suite.child import INTERRUPTED
    from helixbench.reports.suite.file import load_suite
    from helixbench.reports.suite.judge import exit_code_of
    from helixbench.reports.suite.result import Tolerance
    from helixbench.reports.suite.run import SuiteOptions, run_suite
    from helixbench.reports.suite.table import suite_markdown, suite_table

    if len(suite) > 1:
        given = ", ".join(str(file) for file in suite)
        raise InputError(
            f"--suite: given {len(suite)} times ({given}); run one suite at a time, each with its own -o DIR"
        )
    try:
        tolerance = Tolerance(min_ratio=min_ratio, max_ratio=max_ratio, tpot=tpot_tolerance)
    except ValueError as error:
        raise InputError(f"--min-ratio, --max-ratio, --tpot-tolerance: {error}") from error
    result = run_suite(
        load_suite(suite[0], only=tuple(only or ())),
        SuiteOptions(
            out=out, repeats=repeats, tolerance=tolerance, resume=resume, model=model, allow_stale=allow_stale
        ),
    )
    show(suite_table(result), to_stderr=as_json)
    if markdown is not None:
        save_bytes(markdown, suite_markdown(result).encode())
        note(f"wrote {markdown}")
    if as_json:
        print_record(result)
    note(f"{'interrupted; ' if result.is_interrupted else ''}everything is in {out}; --resume goes on from there")
    raise typer.Exit(INTERRUPTED if result.is_interrupted else exit_code_of(result.cases, is_strict=strict))
