"""Max-flow, bound and gap on clusters made from seeds, beside the best baseline, as a table.

Run: ``python -m tests.benchmarks.solver_clusters [seconds] [which]``. ``which`` is ``twenty`` (the default), ``scale``
for how time grows with nodes, types and layers, or ``nodes/types/regions/seed[/layers],...``.
"""

from __future__ import annotations

import math
import resource
import sys
import time
from dataclasses import dataclass, field

from profiler.cluster_profile import ClusterProfile
from solver import Infeasible, Progress, fixed_workload, problems_of, solve_placement
from solver.baselines import METHODS
from solver.capacity import Capacities
from solver.flow import max_flow
from solver.generate import make_cluster

WORKLOAD = fixed_workload(prompt_tokens=763, output_tokens=232)
Spec = tuple[int, ...]
"""nodes, types, regions, seed and, unless 80, layers."""

TWENTY: tuple[Spec, ...] = tuple((10 + 50 * i // 19, 3 + i % 6, 1 + i % 4, i) for i in range(20))
NODES: tuple[Spec, ...] = tuple((nodes, 8, 10, 0) for nodes in (25, 50, 100, 200, 400, 1000))
TYPES: tuple[Spec, ...] = tuple((100, types, 1, 0) for types in (1, 2, 4, 8))
LAYERS: tuple[Spec, ...] = tuple((100, 8, 1, 0, layers) for layers in (20, 40, 80))
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
    return max((max_flow(capacities, found, partial=True).tokens_per_s for found in placements if found), default=0.0)


def main(seconds: float, clusters: tuple[Spec, ...]) -> None:
    """Print one row for each cluster, the geometric means, and the most memory that it took."""
    print(f"| {COLUMNS} |")
    print("|" + " --- |" * len(COLUMNS.split("|")))
    ratios, gaps, worse = [], [], 0
    for nodes, types, regions, seed, *more in clusters:
        layers = more[0] if more else 80
        profile = make_cluster(num_nodes=nodes, num_types=types, num_regions=regions, seed=seed, num_layers=layers)
        watch = Watch()
        began = time.perf_counter()
        answer = solve_placement(profile, WORKLOAD, objective="max-flow", time_limit_s=seconds, on_progress=watch.hear)
        took = time.perf_counter() - began
        row = f"| {nodes} | {types} | {regions} | {layers} | {seed}"
        if isinstance(answer, Infeasible):
            print(f"{row} | {answer.reason[:60]} | | | | | | {took:.1f} | |")
            continue
        assert not list(problems_of(profile, answer))
        baseline = best_baseline(profile)
        flow, gap = answer.predicted.max_flow_tokens_per_s, answer.predicted.gap
        gaps.append(gap)
        if baseline > 0:
            ratios.append(flow / baseline)
            worse += flow < baseline * (1 - 1e-9)
        print(
            f"{row} | {flow:.0f} | {answer.predicted.upper_bound_tokens_per_s:.0f} | {gap:.1%} | {baseline:.0f} "
            f"| {watch.first_s or took:.2f} | {watch.last_s:.1f} | {took:.1f} | {answer.solver.status} |",
            flush=True,
        )
    if ratios:
        over = math.exp(sum(map(math.log, ratios)) / len(ratios))
        mean_gap = math.exp(sum(math.log(1 + gap) for gap in gaps) / len(gaps)) - 1
        print(f"\ngeometric means: {over:.3f} times the best baseline, gap {mean_gap:.1%}; below a baseline: {worse}")
    print(f"most memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB")


if __name__ == "__main__":
    asked = sys.argv[2] if len(sys.argv) > 2 else "twenty"
    chosen = NAMED.get(asked) or tuple(tuple(map(int, spec.split("/"))) for spec in asked.split(","))
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 60.0, chosen)
