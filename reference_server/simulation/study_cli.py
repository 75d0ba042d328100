"""The command ``study``: simulates all combinations of a file, prints one table, writes JSON, CSV and SVG."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from helixbench.reference_server.simulation.study import StudyResult, StudyRow


def study(
    file: Annotated[Path, typer.Argument(help="TOML: clusters, placements, routings, workloads, seeds.")],
    output: Annotated[
        Optional[Path],  # noqa: UP045 - typer reads it
        typer.Option("--output", "-o", help="The folder for study.json, study.csv and study.svg."),
    ] = None,
    data: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--data", help="The folder in which the file's paths begin. Default: its own."),
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")] = False,
) -> None:
    """Simulate placements x routings x workloads x seeds, and compare them in one table.

    Started again with the same file and folder, it goes on where it was left.
    """
    from rich.console import Console

    from helixbench.progress import Reporter
    from helixbench.records import encode_record, save_bytes, save_record
    from helixbench.reference_server.simulation.cli import interrupt_flag
    from helixbench.reference_server.simulation.study import csv_of, known_rows, require_methods, run_study
    from helixbench.reference_server.simulation.study_chart import study_svg
    from helixbench.reference_server.simulation.study_spec import load_study

    spec = load_study(file)
    require_methods(spec)
    folder = data or file.parent
    known = known_rows(spec, folder, output / "study.json") if output is not None else ()
    is_interrupted = interrupt_flag()
    with Reporter() as reporter:

        def on_rows(done: StudyResult, total: int) -> None:
            reporter.update("runs simulated", len(done.rows), total)
            if output is not None and len(done.rows) > len(known):
                save_record(output / "study.json", done)

        result = run_study(spec, folder, known=known, plans=output, on_rows=on_rows, is_interrupted=is_interrupted)
    if json_:
        sys.stdout.write(encode_record(result).decode())
    console = Console(stderr=json_, width=None if sys.stdout.isatty() else 160)
    console.print(_table(result))
    if output is not None:
        save_record(output / "study.json", result)
        save_bytes(output / "study.csv", csv_of(result.rows).encode())
        save_bytes(output / "study.svg", study_svg(result).encode())
        console.print(f"{output}: study.json, study.csv, study.svg", highlight=False)
    if is_interrupted():
        raise typer.Exit(130)


def _table(result: StudyResult) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(title=f"{result.title} (SIMULATED: no hardware ran)", box=box.SIMPLE_HEAD, title_justify="left")
    for name in ("cluster", "load", "placement", "routing", "seed"):
        table.add_column(name)
    for name in ("tokens/s", "output/s", "TTFT p50", "TPOT p50", "p99", "in flight", "waiting", "KV peak", "busiest"):
        table.add_column(name, justify="right")
    for row in result.rows:
        known = (row.cluster, row.workload, row.placement, row.routing, str(row.seed))
        table.add_row(*known, *(_numbers(row) if row.total_tokens_per_s is not None else (row.problem,)))
    return table


def _numbers(row: StudyRow) -> tuple[str, ...]:
    def number(value: float | None, unit: str = "") -> str:
        return "" if value is None else f"{value:.4g}{unit}"

    return (
        number(row.total_tokens_per_s),
        number(row.output_tokens_per_s),
        number(row.ttft_p50_s, " s"),
        number(row.tpot_p50_s, " s"),
        number(row.tpot_p99_s, " s"),
        "" if row.in_flight_at_end is None else str(row.in_flight_at_end),
        "" if row.waiting_at_end is None else str(row.waiting_at_end),
        "" if row.kv_peak is None else f"{row.kv_peak:.0%}",
        "" if row.busiest_share is None else f"{row.busiest} {row.busiest_share:.0%}",
    )
