"""Plans of published24 under the published simulator's rules, beside the figures that it gave itself.

Run: ``python -m benchmarks.published_plans [--settled] [PLAN.json ...]``. Without a plan: those whose figures are
known, and one made by hand for these rules. 600 s after 60 s; settled: 600 s after 1800 s.
"""

from __future__ import annotations

import csv
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.published_rules import Placement, Simulation
from helixbench.profiler.cluster import ClusterProfile
from helixbench.records import load_record
from helixbench.solver import Plan, SolveConfig, fixed_workload, solve_placement

DATA = Path(__file__).parents[1] / "examples" / "data"
WARMUP_S, SETTLED_S, WINDOW_S = 60.0, 1800.0, 600.0


def conversation_lengths(path: Path) -> list[tuple[int, int]]:
    """Lengths of the trace's requests that the published simulator keeps."""
    with path.open(newline="") as file:
        rows = [(int(row["ContextTokens"]), int(row["GeneratedTokens"])) for row in csv.DictReader(file)]
    return [(prompt, output) for prompt, output in rows if 4 <= prompt <= 2048 and 4 <= output <= 1024]


def chain(profile: ClusterProfile, stages: Sequence[tuple[str, int, int]]) -> dict[str, tuple[int, int]]:
    """Stages one after another: (device, layers, nodes side by side)."""
    left: dict[str, list[str]] = {}
    for node in profile.nodes:
        left.setdefault(node.device.name, []).append(node.name)
    placement, reached = {}, 0
    for device, layers, width in stages:
        for _ in range(width):
            placement[left[device].pop(0)] = (reached, reached + layers)
        reached += layers
    assert reached == profile.model.num_layers
    return placement


PUBLISHED_MILP = (
    "7-11 34-38 23-25 53-60 77-80 53-60 68-77 26-30 30-34 37-49 60-68 42-49 "
    "33-37 38-42 3-7 0-3 11-14 14-23 46-53 42-46 25-26 53-60 49-53 26-33"
)
"""Of the nodes in the file's order."""


def known_plans(profile: ClusterProfile) -> dict[str, tuple[dict[str, tuple[int, int]], tuple[float, ...]]]:
    """Name -> placement and the published simulator's total, decode tokens/s, seconds a token, in flight at the end."""
    names = [node.name for node in profile.nodes]
    ranges = [(int(a), int(b)) for a, b in (text.split("-") for text in PUBLISHED_MILP.split())]
    baselines = {}
    for method in ("petals", "swarm"):
        plan = solve_placement(
            SolveConfig(cluster=profile, workload=fixed_workload(prompt_tokens=763, output_tokens=232), method=method)
        )
        assert isinstance(plan, Plan)
        baselines[method] = {name: (held.start, held.end) for name, held in plan.placement.items()}
    four_a100 = [("A100", 8, 1)] * 4
    return {
        "published MILP": (dict(zip(names, ranges, strict=True)), (966, 252, 1.45, 341)),
        "petals": (baselines["petals"], (757, 191, 1.00, 195)),
        "swarm": (baselines["swarm"], (389, 128, 1.55, 175)),
        "flow-optimal": (
            chain(profile, [*four_a100, *[("L4", 3, 1)] * 8, *[("T4", 2, 1)] * 12]),
            (1008, 222, 2.03, 406),
        ),
        "wide": (chain(profile, [*four_a100, *[("L4", 6, 2)] * 4, *[("T4", 4, 2)] * 6]), (906, 250, 1.59, 358)),
        "KV-balanced": (
            chain(profile, [("A100", 7, 1)] * 4 + [("L4", 4, 1)] * 8 + [("T4", 2, 2)] * 2 + [("T4", 2, 1)] * 8),
            (1210, 240, 2.23, 493),
        ),
        "pairs apart": (
            chain(profile, [("T4", 3, 2), ("A100", 7, 1)] * 4 + [("L4", 4, 1)] * 8 + [("T4", 2, 1)] * 4),
            (),
        ),
    }


def main(arguments: Sequence[str]) -> None:
    """Print a row a plan."""
    profile = load_record(DATA / "clusters" / "published24-llama70b.json", ClusterProfile)
    lengths = conversation_lengths(DATA / "azure_llm_2023_conv.csv")
    files = [Path(argument) for argument in arguments if not argument.startswith("--")]
    plans: dict[str, tuple[Placement, tuple[float, ...]]] = {}
    for file in files:
        placed = json.loads(file.read_text())["placement"]
        plans[file.stem] = ({name: (held[0], held[1]) for name, held in placed.items()}, ())
    if not files:
        plans.update(known_plans(profile))
    warmup_s = SETTLED_S if "--settled" in arguments else WARMUP_S
    print("| plan | total, output tokens/s | s per token | in flight at the end, mean | dropped | published | CPU s |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, (placement, known) in plans.items():
        began = time.process_time()
        partial = name != "published MILP"  # it was published for whole ranges only, with links for those
        simulation = Simulation(profile, DATA / "gpu_profiles", lengths, placement, partial=partial)
        served = simulation.run(warmup_s=warmup_s, window_s=WINDOW_S)
        print(
            f"| {name} | {served.total_tokens_per_s:.0f}, {served.decode_tokens_per_s:.0f} | {served.decode_s:.2f} "
            f"| {served.in_flight}, {served.in_flight_mean:.0f} | {served.dropped} | {', '.join(map(str, known))} "
            f"| {time.process_time() - began:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main(sys.argv[1:])
