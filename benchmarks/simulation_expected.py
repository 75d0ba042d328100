"""``expected`` against simulated: published24 with imported timings and ten clusters from seeds, three plans each.

Run: ``python -m benchmarks.simulation_expected [cluster,...]`` (numbers from 0; all of them without).
All requests are there from the start and the KV caches say how many are in flight. Simulated are ``WARMUP_ROUNDS``
times as many requests, then ``WINDOW_ROUNDS`` times as many that count. One row a plan, then
the median and the worst difference.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from helixbench.profiler.cluster import ClusterProfile
from helixbench.profiler.import_tables import with_imported_costs
from helixbench.records import load_record
from helixbench.reference_server.simulation import Arrivals, SimulationConfig, simulate
from helixbench.solver import Infeasible, Plan, SolveConfig, fixed_workload, solve_placement
from helixbench.solver.questions.generate import make_cluster

DATA = Path(__file__).parents[1] / "examples" / "data"
WORKLOAD = fixed_workload(prompt_tokens=763, output_tokens=232)
GENERATED = tuple((nodes, 3, regions, seed) for seed, nodes in enumerate((10, 12, 16, 20, 24)) for regions in (1, 3))
PLANS = ({"method": "auto"}, {"method": "auto", "objective": "max-flow"}, {"method": "petals"})
SOLVE_S = 6.0
WARMUP_ROUNDS, WINDOW_ROUNDS = 6, 4


def clusters() -> Iterator[tuple[str, ClusterProfile]]:
    """Name and profile of each."""
    published = load_record(DATA / "clusters" / "published24-llama70b.json", ClusterProfile)
    yield "published24, imported", with_imported_costs(published, DATA / "gpu_profiles")
    for nodes, types, regions, seed in GENERATED:
        profile = make_cluster(num_nodes=nodes, num_types=types, num_regions=regions, seed=seed)
        yield f"{nodes} nodes, {regions} regions, seed {seed}", profile


def main(chosen: set[int]) -> None:
    """Print the table."""
    print("| cluster | plan | in flight | max-flow | expected | simulated | expected / simulated | CPU s |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    ratios: dict[str, float] = {}
    for number, (name, profile) in enumerate(clusters()):
        if chosen and number not in chosen:
            continue
        for options in PLANS:
            label = " ".join(options.values())
            plan = solve_placement(SolveConfig(cluster=profile, workload=WORKLOAD, time_limit_s=SOLVE_S, **options))  # type: ignore[arg-type]
            if isinstance(plan, Infeasible):
                print(f"| {name} | {label} | | | | {plan.reason[:60]} | | |")
                continue
            began = time.process_time()
            simulated = _simulated(plan, profile)
            took = time.process_time() - began
            expected = plan.predicted.expected[-1].total_tokens_per_s
            ratios[f"{name}, {label}"] = expected / simulated
            print(
                f"| {name} | {label} | {plan.predicted.expected[-1].concurrency} "
                f"| {plan.predicted.max_flow_tokens_per_s:.0f} | {expected:.0f} | {simulated:.0f} "
                f"| {expected / simulated:.3f} | {took:.1f} |",
                flush=True,
            )
    off = {name: abs(ratio - 1) for name, ratio in ratios.items()}
    worst = max(off, key=lambda name: off[name])
    print(f"\nmedian {statistics.median(off.values()):.1%} off, worst {off[worst]:.1%} ({worst}), {len(off)} plans")


def _simulated(plan: Plan, profile: ClusterProfile) -> float:
    expected = plan.predicted.expected[-1]
    prompt_tokens, output_tokens = WORKLOAD.lengths[0]
    round_s = expected.concurrency * (prompt_tokens + output_tokens) / expected.total_tokens_per_s
    config = SimulationConfig(
        workload=WORKLOAD,
        arrivals=Arrivals(kind="offline"),
        warmup_s=WARMUP_ROUNDS * round_s,
        duration_s=WINDOW_ROUNDS * round_s,
    )
    return simulate(plan, profile, config).run.total_tokens_per_s


if __name__ == "__main__":
    main({int(number) for number in sys.argv[1].split(",")} if len(sys.argv) > 1 else set())
