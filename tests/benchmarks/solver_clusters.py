"""Max-flow, bound and gap on clusters made from seeds, beside the best baseline, as a table.

Run: ``python -m tests.benchmarks.solver_clusters [seconds] [nodes/types/regions/seed,...]``. Twenty by default;
``scale`` for the table of how time grows.
"""

from __future__ import annotations

import math
import sys
import time

from solver import Infeasible, fixed_workload, problems_of, solve_placement
from solver.baselines import METHODS
from solver.capacity import Capacities
from solver.flow import max_flow
from solver.generate import make_cluster

TWENTY = tuple((10 + 50 * i // 19, 3 + i % 6, 1 + i % 4, i) for i in range(20))
SCALE = ((24, 3, 1, 0), (50, 4, 1, 0), (100, 4, 2, 0), (200, 6, 4, 0), (400, 8, 6, 0), (1000, 8, 10, 0))
WORKLOAD = fixed_workload(prompt_tokens=763, output_tokens=232)


def main(seconds: float, clusters: tuple[tuple[int, int, int, int], ...]) -> None:
    """Print one row for each cluster and the geometric means."""
    print(
        "| nodes | types | regions | seed | max-flow | bound | gap | best baseline | first plan s | seconds | status |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    ratios, gaps = [], []
    for nodes, types, regions, seed in clusters:
        profile = make_cluster(num_nodes=nodes, num_types=types, num_regions=regions, seed=seed)
        capacities = Capacities(profile, WORKLOAD)
        placements = [rule(capacities) for rule in METHODS.values()]
        best = max((max_flow(capacities, p, partial=True).tokens_per_s for p in placements if p), default=0.0)
        began, first = time.perf_counter(), list[float]()
        answer = solve_placement(
            profile,
            WORKLOAD,
            objective="max-flow",
            time_limit_s=seconds,
            on_progress=lambda moment, first=first: (
                first.append(moment.seconds) if moment.incumbent_tokens_per_s else None
            ),
        )
        took = time.perf_counter() - began
        if isinstance(answer, Infeasible):
            print(f"| {nodes} | {types} | {regions} | {seed} | {answer.reason[:60]} | | | | | {took:.1f} | |")
            continue
        assert not list(problems_of(profile, answer))
        flow, gap = answer.predicted.max_flow_tokens_per_s, answer.predicted.gap
        gaps.append(gap)
        if best > 0:
            ratios.append(flow / best)
        print(
            f"| {nodes} | {types} | {regions} | {seed} | {flow:.0f} | {answer.predicted.upper_bound_tokens_per_s:.0f} "
            f"| {gap:.1%} | {best:.0f} | {min(first, default=took):.2f} | {took:.1f} | {answer.solver.status} |",
            flush=True,
        )
    if ratios:
        over = math.exp(sum(map(math.log, ratios)) / len(ratios))
        mean_gap = math.exp(sum(math.log(1 + gap) for gap in gaps) / len(gaps)) - 1
        print(f"\ngeometric means: {over:.3f} times the best baseline, gap {mean_gap:.1%}")


if __name__ == "__main__":
    asked = sys.argv[2] if len(sys.argv) > 2 else "twenty"
    named = {"twenty": TWENTY, "scale": SCALE}
    chosen = named.get(asked) or tuple(tuple(map(int, spec.split("/"))) for spec in asked.split(","))
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 60.0, chosen)  # type: ignore[arg-type]
