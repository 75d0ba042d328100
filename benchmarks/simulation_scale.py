"""How the simulator's time and memory grow with nodes, on clusters from seeds, offline with mean lengths 763/232.

Run: ``python -m benchmarks.simulation_scale [nodes,...] [simulated seconds]``. One process a size, so that each
has its own peak of memory.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time

from helixbench.reference_server.simulation import Arrivals, SimulationConfig, simulate
from helixbench.solver import Infeasible, SolveConfig, fixed_workload, solve_placement
from helixbench.solver.questions.generate import make_cluster

WORKLOAD = fixed_workload(prompt_tokens=763, output_tokens=232)


def one(num_nodes: int, seconds: float) -> None:
    """One row: a swarm placement, which is there at once at any size."""
    profile = make_cluster(num_nodes=num_nodes, num_types=3, num_regions=1, seed=0)
    plan = solve_placement(
        SolveConfig(cluster=profile, workload=WORKLOAD, method="swarm", objective="max-flow", time_limit_s=5)
    )
    assert not isinstance(plan, Infeasible)
    config = SimulationConfig(
        workload=WORKLOAD, arrivals=Arrivals(kind="offline"), warmup_s=60.0, duration_s=seconds - 60
    )
    began = time.process_time()
    result = simulate(plan, profile, config)
    took = time.process_time() - began
    mebibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    run = result.run
    print(
        f"| {num_nodes} | {run.concurrency} | {run.total_tokens_per_s:.0f} | {result.num_events} | {took:.1f} "
        f"| {result.num_events / took:.0f} | {mebibytes:.0f} |",
        flush=True,
    )


def main(sizes: list[int], seconds: float) -> None:
    """The table."""
    print("| nodes | in flight | tokens/s | events | CPU s | events/s | MiB |")
    print("| --- | --- | --- | --- | --- | --- | --- |", flush=True)
    for size in sizes:
        subprocess.run(
            [sys.executable, "-m", "benchmarks.simulation_scale", "one", str(size), str(seconds)], check=True
        )


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1] == "one":
        one(int(sys.argv[2]), float(sys.argv[3]))
    else:
        chosen = [int(size) for size in sys.argv[1].split(",")] if len(sys.argv) > 1 else [24, 100, 400, 1000]
        main(chosen, float(sys.argv[2]) if len(sys.argv) > 2 else 680.0)
