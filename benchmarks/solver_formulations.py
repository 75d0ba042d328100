"""The arc and the published formulation in the same HiGHS: incumbent and bound over time, as CSV and as a plot.

Run: ``python -m benchmarks.solver_formulations [seconds] [folder]``; 120 s into docs/results/formulations unless given.
Both get the cluster published24 (4 A100, 8 L4, 12 T4; LLaMA-2 70B), one thread, the same options and no start.
"""

from __future__ import annotations

import csv
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.time_plot import Curve, time_plot
from helixbench.solver.bounds.work import work_bound
from helixbench.solver.placement import milp
from helixbench.solver.placement.published import published_model
from helixbench.solver.problem.capacity import Capacities
from tests.solver.clusters import WORKLOAD, published

FIGURES = ("seconds", "incumbent_tokens_per_s", "bound_tokens_per_s")
COLOURS = {"arc": "#0969da", "published": "#cf222e"}
GAP = 1e-6

LEAST = 1e-3
"""Tokens/s. An incumbent below it is a placement that carries nothing, and none."""


@dataclass(frozen=True)
class Run:
    """A formulation's way: (seconds, incumbent or 0, bound) whenever either changed, and how it ended."""

    name: str
    points: list[tuple[float, float, float]]
    status: str


def arc(capacities: Capacities) -> milp.Model:
    """The arc formulation as the search builds it: pooled, clipped at the bound that takes no search."""
    clip = work_bound(capacities)
    return milp.pooled_model(capacities, list(capacities.nodes), clip=clip)


def run(name: str, build: Callable[[], milp.Model], seconds: float) -> Run:
    """Build and solve one formulation; the clock runs from before it was built."""
    heard: list[tuple[float, float, float]] = []
    began = time.perf_counter()

    def hear(incumbent: float, bound: float, _: float) -> None:
        heard.append((time.perf_counter() - began, incumbent if incumbent > LEAST else 0.0, bound))

    outcome = milp.solve(build(), milp.Limits(time_s=seconds, relative_gap=GAP), report=hear)
    hear(outcome.value, outcome.bound, 0.0)
    return Run(name, _improving(heard), outcome.end.name.lower())


def _improving(heard: list[tuple[float, float, float]]) -> list[tuple[float, float, float]]:
    """Best incumbent and lowest bound so far, where one of them changed; the last moment always."""
    best, lowest = 0.0, float("inf")
    points = []
    for number, (seconds, incumbent, bound) in enumerate(heard):
        better = max(best, incumbent), min(lowest, bound)
        if better != (best, lowest) or number == len(heard) - 1:
            points.append((seconds, *better))
        best, lowest = better
    return points


def main(seconds: float, folder: Path) -> None:
    """Run both, write ``published24.csv`` and ``published24.svg``, print how each ended."""
    capacities = Capacities(published("published24-llama70b"), WORKLOAD)
    runs = [
        run("arc", lambda: arc(capacities), seconds),
        run("published", lambda: published_model(capacities), seconds),
    ]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "published24.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["formulation", *FIGURES])
        for found in runs:
            writer.writerows([found.name, f"{s:.3f}", f"{best:.2f}", f"{bound:.2f}"] for s, best, bound in found.points)
    (folder / "published24.svg").write_text(drawn(folder / "published24.csv"))
    print("| formulation | seconds | status | incumbent | bound | gap |\n| --- | --- | --- | --- | --- | --- |")
    for found in runs:
        s, best, bound = found.points[-1]
        gap = f"{(bound - best) / best:.2%}" if best else "none"
        print(f"| {found.name} | {s:.1f} | {found.status} | {best:.1f} | {bound:.1f} | {gap} |")


def drawn(table: Path) -> str:
    """The plot of a table that ``main`` wrote."""
    with table.open(newline="") as file:
        rows = [(row["formulation"], *(float(row[name]) for name in FIGURES)) for row in csv.DictReader(file)]
    curves = []
    for name, colour in COLOURS.items():
        points = [(s, best, bound) for formulation, s, best, bound in rows if formulation == name]
        found = [(s, best) for s, best, _ in points if best > 0]
        curves.append(Curve(f"{name}: incumbent", colour, found, False))
        curves.append(Curve(f"{name}: bound", colour, [(s, bound) for s, _, bound in points], True))
    return time_plot(
        "published24 in HiGHS, one thread: solid incumbent, dashed bound", curves, until_s=max(row[1] for row in rows)
    )


if __name__ == "__main__":
    main(
        float(sys.argv[1]) if len(sys.argv) > 1 else 120.0,
        Path(sys.argv[2] if len(sys.argv) > 2 else "docs/results/formulations"),
    )
