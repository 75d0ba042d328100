"""Max-flow, bound and gap on clusters made from seeds, beside the best baseline, as a table.

Run: ``python -m benchmarks.solver_clusters [seconds] [which]``. ``which`` is ``twenty`` (the default), ``scale``
for how time grows with nodes, types and layers, or ``nodes/types/regions/seed[/layers],...``; ``twenty:0-9`` are those
of the twenty with seeds 0 to 9. ``python -m benchmarks.solver_clusters means FILE ...`` gives the means over all
rows that earlier runs printed to files.
"""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from helixbench.profiler.cluster import ClusterProfile
from helixbench.solver import Infeasible, Progress, SolveConfig, fixed_workload, problems_of, solve_placement
from helixbench.solver.flow.max_flow import max_flow
from helixbench.solver.placement.baselines import METHODS
from helixbench.solver.problem.capacity import Capacities
from helixbench.solver.questions.generate import make_cluster

WORKLOAD = fixed_workload(prompt_tokens=763, output_tokens=232)
Spec = tuple[int, ...]
"""nodes, types, regions, seed and, unless 80, layers."""

TWENTY: tuple[Spec, ...] = tuple((10 + 50 * i // 19, 3 + i % 6, 1 + i % 4, i) for i in range(20))
NODES: tuple[Spec, ...] = tuple((nodes, 8, 10, 0) for nodes in (25, 100, 400))
TYPES: tuple[Spec, ...] = tuple((100, types, 1, 0) for types in (1, 4, 8))
LAYERS: tuple[Spec, ...] = tuple((100, 8, 1, 0, layers) for layers in (20, 40))
NAMED = {"twenty": TWENTY, "scale": (*NODES, *TYPES, *LAYERS)}

COLUMNS = (
    "nodes | types | regions | layers | seed | max-flow | bound | gap | best baseline | first plan s | best plan s "
    "| seconds | status"
)


@dataclass
class Watch:
    """When a search had its first plan and when its last one."""

    first_s: float | None = None
    last_s: float = 0.0
    best: float = field(default=0.0)

    def hear(self, moment: Progress) -> None:
        """Take a moment of the search."""
        now = moment.incumbent_tokens_per_s
        if now is None or now <= self.best * (1 + 1e-9):
            return
        self.first_s = moment.seconds if self.first_s is None else self.first_s
        self.best, self.last_s = now, moment.seconds


def best_baseline(profile: ClusterProfile) -> float:
    """The largest max-flow of any baseline's placement; 0 where none finds one."""
    capacities = Capacities(profile, WORKLOAD)
    placements = [rule(capacities) for rule in METHODS.values()]
    return max((max_flow(capacities, found).tokens_per_s for found in placements if found), default=0.0)


@dataclass(frozen=True)
class Result:
    """What counts of one cluster: its number of regions, its max-flow, bound and best baseline in tokens/s."""

    regions: int
    flow: float
    bound: float
    baseline: float


def main(seconds: float, clusters: Sequence[Spec]) -> None:
    """Print one row for each cluster as it is done, the geometric means, and the most memory that it took."""
    print(f"| {COLUMNS} |")
    print("|" + " --- |" * len(COLUMNS.split("|")), flush=True)
    results = []
    for nodes, types, regions, seed, *more in clusters:
        layers = more[0] if more else 80
        profile = make_cluster(num_nodes=nodes, num_types=types, num_regions=regions, seed=seed, num_layers=layers)
        watch = Watch()
        began = time.perf_counter()
        answer = solve_placement(
            SolveConfig(cluster=profile, workload=WORKLOAD, objective="max-flow", time_limit_s=seconds), watch.hear
        )
        took = time.perf_counter() - began
        row = f"| {nodes} | {types} | {regions} | {layers} | {seed}"
        if isinstance(answer, Infeasible):
            print(f"{row} | {answer.reason[:60]} | | | | | | {took:.1f} | |", flush=True)
            continue
        assert not list(problems_of(profile, answer))
        flow, bound = answer.predicted.max_flow_tokens_per_s, answer.predicted.upper_bound_tokens_per_s
        results.append(Result(regions, flow, bound, best_baseline(profile)))
        print(
            f"{row} | {flow:.0f} | {bound:.0f} | {answer.predicted.gap:.1%} | {results[-1].baseline:.0f} "
            f"| {watch.first_s or took:.2f} | {watch.last_s:.1f} | {took:.1f} | {answer.solver.status} |",
            flush=True,
        )
    print_means(results)
    print(f"most memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB")


def print_means(results: Sequence[Result]) -> None:
    """Geometric means by number of regions and over all, and how many are below a baseline."""
    print("\n| regions | clusters | times the best baseline | gap | largest gap |\n| --- | --- | --- | --- | --- |")
    for regions in (*sorted({result.regions for result in results}), None):
        chosen = [result for result in results if regions in (None, result.regions)]
        over = [result.flow / result.baseline for result in chosen if result.baseline > 0]
        gaps = [result.bound / result.flow for result in chosen]
        mean_over = f"{_geometric_mean(over):.3f}" if over else "no baseline"
        print(
            f"| {regions or 'all'} | {len(chosen)} | {mean_over} | {_geometric_mean(gaps) - 1:.1%} "
            f"| {max(gaps, default=1.0) - 1:.1%} |"
        )
    print(f"\nbelow a baseline: {sum(result.flow < result.baseline * (1 - 1e-9) for result in results)}", flush=True)


def _geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values)) if values else 1.0


def printed_results(lines: Sequence[str]) -> list[Result]:
    """The results in rows as ``main`` prints them; other lines are passed over."""
    found = []
    for line in lines:
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if len(cells) == len(COLUMNS.split("|")) and cells[0].isdigit() and cells[6]:
            found.append(Result(int(cells[2]), float(cells[5]), float(cells[6]), float(cells[8])))
    return found


def chosen_clusters(which: str) -> tuple[Spec, ...]:
    """The clusters that a name, a range of seeds of one, or a list of specifications stands for."""
    name, _, seeds = which.partition(":")
    if name not in NAMED:
        return tuple(tuple(map(int, spec.split("/"))) for spec in which.split(","))
    first, last = map(int, seeds.split("-")) if seeds else (0, 10**9)
    return tuple(spec for spec in NAMED[name] if first <= spec[3] <= last)


if __name__ == "__main__":
    if sys.argv[1:2] == ["means"]:
        print_means(printed_results([line for file in sys.argv[2:] for line in Path(file).read_text().splitlines()]))
    else:
        main(
            float(sys.argv[1]) if len(sys.argv) > 1 else 60.0,
            chosen_clusters(sys.argv[2] if len(sys.argv) > 2 else "twenty"),
        )
