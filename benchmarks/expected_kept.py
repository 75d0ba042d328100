"""``expected`` of the same plans before and after a change of the code.

Run: ``python -m benchmarks.expected_kept record FOLDER`` with the old code, then ``python -m benchmarks.expected_kept
compare FOLDER`` with the new one. Recording solves for some forty questions (clusters, workloads, concurrencies and
placement methods) and writes each plan's placement and flows with what they are expected to deliver: analytically,
and simulated at once and until settled. Comparing computes the same for the same placements and flows, one row each:
differences of tokens/s, TPOT and TTFT, and the ratios of work and of CPU time.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from helixbench.profiler.cluster import ClusterProfile
from helixbench.profiler.import_tables import with_imported_costs
from helixbench.records import load_record
from helixbench.solver import Infeasible, SolveConfig, Workload, fixed_workload, solve_placement, trace_workload
from helixbench.solver.expected.analytic import predict_analytically
from helixbench.solver.problem.capacity import Capacities
from helixbench.solver.problem.plan import Expected, LinkFlow, Placement
from helixbench.solver.questions.generate import make_cluster
from helixbench.solver.simulation.closed_loop import MIN_REQUESTS, ClosedLoopResult, simulate_closed_loop

DATA = Path(__file__).parents[1] / "examples" / "data"
SOLVE_S = 5.0
GENERATED = ((10, 1, 0), (12, 3, 1), (16, 1, 2), (24, 3, 4))  # nodes, regions, seed
EFFORTS = ((1, 300_000, 0), (8, 2_000_000, 0), (8, 2_000_000, 1))  # windows, work, seed

LONG = fixed_workload(prompt_tokens=763, output_tokens=232)
SHORT = fixed_workload(prompt_tokens=256, output_tokens=64)
CHAT = fixed_workload(prompt_tokens=64, output_tokens=128)


class Simulated(msgspec.Struct, frozen=True):
    """One simulation of a plan; ``result`` is ``None`` where the work was too little."""

    windows: int
    max_work: int
    seed: int
    seconds: float
    result: ClosedLoopResult | None


class Kept(msgspec.Struct, frozen=True):
    """A plan and what was expected of it."""

    name: str
    profile: ClusterProfile
    workload: Workload
    concurrency: int | None
    placement: Placement
    flows: tuple[LinkFlow, ...]
    max_decode_batch: int | None
    max_batch_tokens: int | None
    means: Expected
    runs: tuple[Simulated, ...]


def questions() -> Iterator[tuple[str, ClusterProfile, Workload, int | None, str]]:
    """Name, cluster, workload, concurrency and method of each plan."""
    trace = trace_workload(DATA / "azure_llm_2023_conv.csv")
    talk = Workload(source=trace.source, lengths=tuple(x for x in trace.lengths if x[0] <= 2048 and x[1] <= 1024))
    tables, regions, small = (
        load_record(DATA / "clusters" / f"{name}.json", ClusterProfile)
        for name in ("published24-llama70b", "published24-three-regions-llama70b", "published8-l4-llama30b")
    )
    imported = with_imported_costs(tables, DATA / "gpu_profiles")
    scattered = _scattered(imported)
    loads: dict[str, tuple[Workload, int | None]] = {
        "auto": (SHORT, 240), "petals": (LONG, None), "swarm": (SHORT, 64), "homogeneous": (talk, 120)
    }  # fmt: skip
    imported_regions = with_imported_costs(regions, DATA / "gpu_profiles")
    for name, profile in {"p24": tables, "i24": imported, "i24r": imported_regions, "s24": scattered}.items():
        for method, (workload, concurrency) in loads.items():
            yield f"{name} {method}", profile, workload, concurrency, method
    yield "i24 auto conv", imported, talk, 120, "auto"
    yield "i24 auto long", imported, LONG, None, "auto"
    yield "i24 auto 16", imported, CHAT, 16, "auto"
    yield "p24r auto", regions, LONG, None, "auto"
    yield "p24r petals", regions, SHORT, 240, "petals"
    yield "p8 auto", small, LONG, None, "auto"
    yield "p8 swarm", small, SHORT, 32, "swarm"
    yield "p8 separate", small, SHORT, 32, "separate"
    for num_nodes, num_regions, seed in GENERATED:
        profile = make_cluster(num_nodes=num_nodes, num_types=3, num_regions=num_regions, seed=seed)
        yield f"gen{num_nodes} auto", profile, LONG, None, "auto"
        yield f"gen{num_nodes} petals", profile, SHORT, 100, "petals"
    yield "whole model, conv", _whole_model(scattered, 3), talk, 48, "swarm"
    yield "whole model, chat", _whole_model(scattered, 2), CHAT, 12, "swarm"


def _scattered(profile: ClusterProfile) -> ClusterProfile:
    """Iterations that scatter by a tenth, and a coordinator that takes its time."""
    nodes = []
    for node in profile.nodes:
        assert node.cost is not None
        cost = msgspec.structs.replace(node.cost, stage=msgspec.structs.replace(node.cost.stage, variation=0.1))
        nodes.append(msgspec.structs.replace(node, cost=cost))
    times = msgspec.structs.replace(profile.coordinator, message_s=1e-4, token_s=2e-5, request_s=1e-4)
    return msgspec.structs.replace(profile, nodes=tuple(nodes), coordinator=times)


def _whole_model(profile: ClusterProfile, num_nodes: int) -> ClusterProfile:
    """Nodes that each hold all of a small model, so that they wait for their batches."""
    nodes = tuple(msgspec.structs.replace(node, max_layers=6) for node in profile.nodes[:num_nodes])
    return msgspec.structs.replace(profile, model=msgspec.structs.replace(profile.model, num_layers=6), nodes=nodes)


def simulations(kept: Kept, capacities: Capacities) -> tuple[Simulated, ...]:
    """The plan, simulated with each effort."""
    runs = []
    for windows, max_work, seed in EFFORTS:
        began = time.process_time()
        result = simulate_closed_loop(
            capacities,
            kept.placement,
            kept.flows,
            kept.concurrency,
            max_decode_batch=kept.max_decode_batch,
            max_batch_tokens=kept.max_batch_tokens,
            min_requests=MIN_REQUESTS if len(kept.workload.lengths) > 1 else 0,
            max_windows=windows,
            max_work=max_work,
            seed=seed,
        )
        runs.append(Simulated(windows, max_work, seed, time.process_time() - began, result))
    return tuple(runs)


def record(folder: Path) -> None:
    """Solve, simulate, and write one file per plan; files that are there already stay as they are."""
    folder.mkdir(exist_ok=True)
    for name, profile, workload, concurrency, method in questions():
        path = folder / f"{name.replace(' ', '_')}.json"
        if path.exists():
            continue
        config = SolveConfig(
            cluster=profile, workload=workload, concurrency=concurrency, method=method, time_limit_s=SOLVE_S
        )
        plan = solve_placement(config)
        if isinstance(plan, Infeasible):
            print(f"{name}: {plan.reason}")
            continue
        capacities = Capacities(profile, workload, concurrency=concurrency)
        used = {flow.dst for flow in plan.flows if flow.flow_tokens_per_s > 0}
        placement = {node: held for node, held in plan.placement.items() if node in used}
        limits = [
            limit
            for node in placement
            if (cost := capacities.nodes[node].cost) is not None
            and (limit := plan.nodes[node].max_batch_tokens) is not None
            and limit < cost.max_batch_tokens
        ]
        kept = Kept(
            name=name,
            profile=profile,
            workload=workload,
            concurrency=concurrency,
            placement=placement,
            flows=plan.flows,
            max_decode_batch=plan.max_decode_batch,
            max_batch_tokens=limits[0] if limits else None,
            means=predict_analytically(capacities, placement, plan.flows, concurrency),
            runs=(),
        )
        kept = msgspec.structs.replace(kept, runs=simulations(kept, capacities))
        path.write_bytes(msgspec.json.encode(kept))
        print(name, flush=True)


def compare(folder: Path, chosen: list[str]) -> None:
    """One row for each simulation, then the worst difference and the ratio of CPU times."""
    print("| plan | analytic | tokens/s before | settled | tokens/s | TPOT | TTFT | work | CPU time |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    worst, worst_settled, seconds = 0.0, 0.0, [0.0, 0.0]
    for path in sorted(folder.glob("*.json")):
        if chosen and not any(part in path.name for part in chosen):
            continue
        kept = msgspec.json.decode(path.read_bytes(), type=Kept)
        capacities = Capacities(kept.profile, kept.workload, concurrency=kept.concurrency)
        means = predict_analytically(capacities, kept.placement, kept.flows, kept.concurrency)
        analytic = means.total_tokens_per_s / kept.means.total_tokens_per_s - 1
        for before, after in zip(kept.runs, simulations(kept, capacities), strict=True):
            seconds = [seconds[0] + before.seconds, seconds[1] + after.seconds]
            if before.result is None or after.result is None:
                assert before.result is None, f"{kept.name}: cut off now, and not before"
                assert after.result is None, f"{kept.name}: cut off before, and not now"
                continue
            old, new = before.result.expected, after.result.expected
            off = new.total_tokens_per_s / old.total_tokens_per_s - 1
            worst = max(worst, abs(off), abs(analytic))
            if before.result.is_settled and after.result.is_settled:
                worst_settled = max(worst_settled, abs(off))
            print(
                f"| {kept.name} | {analytic:+.2%} | {old.total_tokens_per_s:.1f} "
                f"| {before.result.is_settled:d}{after.result.is_settled:d} | {off:+.2%} "
                f"| {_change(old.tpot_s, new.tpot_s):+.2%} | {_change(old.ttft_s, new.ttft_s):+.2%} "
                f"| {after.result.work / before.result.work:.3f} | {after.seconds / before.seconds:.2f} |",
                flush=True,
            )
    print(
        f"\nworst difference {worst:.2%}, of settled simulations {worst_settled:.2%}; "
        f"{seconds[1] / seconds[0]:.2f} times the CPU time"
    )


def _change(before: float | None, after: float | None) -> float:
    return math.nan if before is None or after is None else after / before - 1


if __name__ == "__main__":
    if sys.argv[1] == "record":
        record(Path(sys.argv[2]))
    else:
        compare(Path(sys.argv[2]), sys.argv[3:])
