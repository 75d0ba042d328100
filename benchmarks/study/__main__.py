"""Simulate placements x routings x workloads x seeds and compare them in one table.

    python -m benchmarks.study examples/studies/three-regions.toml -o out

Writes study.json, study.csv and study.svg. Run again with the same file and folder, it resumes an interrupted study.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.study.chart import study_svg
from benchmarks.study.runs import StudyResult, StudyRow, csv_of, known_rows, run_study
from benchmarks.study.spec import load_study
from helixbench.errors import HelixbenchError
from helixbench.interrupted import EXIT_CODE, Interrupted
from helixbench.progress import Reporter
from helixbench.records import encode_record, save_bytes, save_record


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="TOML: clusters, placements, routings, workloads, seeds")
    parser.add_argument("-o", "--output", type=Path, help="folder for study.json, study.csv and study.svg")
    parser.add_argument("--data", type=Path, help="folder that the file's paths are relative to (default: its own)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON on stdout")
    options = parser.parse_args(arguments)
    spec = load_study(options.study)
    folder, output = options.data or options.study.parent, options.output
    known = known_rows(spec, folder, output / "study.json") if output is not None else ()
    is_interrupted = Interrupted()
    with Reporter() as reporter:

        def on_rows(done: StudyResult, total: int) -> None:
            reporter.update("runs simulated", len(done.rows), total)
            if output is not None and len(done.rows) > len(known):
                save_record(output / "study.json", done)

        result = run_study(spec, folder, known=known, plans=output, on_rows=on_rows, is_interrupted=is_interrupted)
    if options.json:
        sys.stdout.write(encode_record(result).decode())
    console = Console(stderr=options.json, width=None if sys.stdout.isatty() else 160, highlight=False)
    console.print(_table(result))
    if output is not None:
        save_record(output / "study.json", result)
        save_bytes(output / "study.csv", csv_of(result.rows).encode())
        save_bytes(output / "study.svg", study_svg(result).encode())
        console.print(f"{output}: study.json, study.csv, study.svg")
    return EXIT_CODE if is_interrupted() else 0


def _table(result: StudyResult) -> Table:
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


if __name__ == "__main__":
    try:
        sys.exit(main())
    except HelixbenchError as error:
        print(f"study: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
