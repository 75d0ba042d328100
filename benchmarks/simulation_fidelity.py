"""Simulated against measured, for every case of a suite that has been run: throughput, TTFT and TPOT.

Run: ``helixbench validate --suite examples/suites/emulated.toml -o FOLDER``, then
``python -m benchmarks.simulation_fidelity FOLDER``.
Each measured run is simulated once with its own plan, profile, workload, requests in flight, routing and seed,
over as many requests; a ratio is the median over the repeats. Nothing of the runs goes into the simulation.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

from helixbench.profiler.cluster import ClusterProfile
from helixbench.records import digest, load_record
from helixbench.reference_server.run_log import RunLog
from helixbench.reference_server.simulation import Arrivals, SimulationConfig, simulate
from helixbench.reports.verdict.run_metrics import metrics_of

COLUMNS = {"total tokens/s": "total_tokens_per_s", "TTFT p50": "ttft_p50_s", "TPOT p50": "tpot_p50_s"}


def main(folder: Path) -> None:
    """Print the table."""
    files = sorted((folder / "testbeds").glob("*/cluster.json"))
    profiles = {digest(profile): profile for profile in (load_record(file, ClusterProfile) for file in files)}
    print("| case | repeats | " + " | ".join(f"{name}: simulated / measured" for name in COLUMNS) + " |")
    print("| --- " * (2 + len(COLUMNS)) + "|")
    of_all: dict[str, list[float]] = {name: [] for name in COLUMNS}
    for case in sorted((folder / "cases").iterdir()):
        runs = [load_record(file, RunLog) for file in sorted(case.glob("run-*.json"))]
        if not runs:
            print(f"| {case.name} | 0 |" + " |" * len(COLUMNS))
            continue
        ratios: dict[str, list[float]] = {name: [] for name in COLUMNS}
        for run in runs:
            simulated = metrics_of(_simulated(run, profiles[run.plan.provenance.inputs["cluster"]]))
            measured = metrics_of(run)
            for name, metric in COLUMNS.items():
                ratios[name].append(simulated[metric] / measured[metric])
        medians = {name: statistics.median(values) for name, values in ratios.items()}
        print(
            f"| {case.name} | {len(runs)} | " + " | ".join(f"{medians[name]:.3f}" for name in COLUMNS) + " |",
            flush=True,
        )
        for name, value in medians.items():
            of_all[name].append(value)
    for name, values in of_all.items():
        off = sorted(abs(value - 1) for value in values)
        print(f"{name}: bias {statistics.median(values) - 1:+.1%} in the median, worst {off[-1]:.1%}")


def _simulated(run: RunLog, profile: ClusterProfile) -> RunLog:
    config = SimulationConfig(
        workload=run.workload,
        arrivals=Arrivals(kind="closed loop"),
        routing=run.routing,
        seed=run.seed,
        concurrency=run.concurrency,
        num_requests=len(run.requests_in_window()),
        duration_s=None,
        warmup_s=0.0,
    )
    return simulate(run.plan, profile, config).run


if __name__ == "__main__":
    main(Path(sys.argv[1]))
