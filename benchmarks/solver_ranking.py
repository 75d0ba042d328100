"""Rank correlation and error of the analytical estimate, by which the search ranks placements, against simulation.

Run: ``python -m benchmarks.solver_ranking record FILE`` simulates a hundred placements of 8 to 60 nodes, ten of each of
ten questions, under the limits on iterations that are best for each, until they have settled; some ten minutes.
``python -m benchmarks.solver_ranking rank FILE`` estimates the same placements and prints a row for each question:
Spearman's rank correlation, the median and largest relative error, what the best by estimate loses to the best
by simulation, and milliseconds of an estimate.
"""

from __future__ import annotations

import itertools
import random
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
from scipy.stats import spearmanr

from helixbench.profiler.cluster import ClusterProfile, DefaultLink
from helixbench.profiler.import_tables import with_imported_costs
from helixbench.records import load_record
from helixbench.solver import Workload, fixed_workload, trace_workload
from helixbench.solver.expected.analytic import predict_analytically
from helixbench.solver.expected.simulated import Budget, Effort, best_limits, simulated
from helixbench.solver.flow.max_flow import max_flow
from helixbench.solver.placement.balanced_stages import stacks
from helixbench.solver.placement.baselines import METHODS
from helixbench.solver.problem.capacity import Capacities
from helixbench.solver.problem.plan import LayerRange, Placement
from helixbench.solver.questions.generate import make_cluster

DATA = Path(__file__).parents[1] / "examples" / "data"
EACH = 10
"""Placements of each question."""

MOST_TRIED = 20
"""Of each question, for some take too much work to simulate."""

SIDE_BY_SIDE = (1, 2, 4)
"""Nodes of a stage in the placements whose stages fill evenly."""

LIMITS, SETTLED = Effort(max_work=400_000), Effort(max_work=500_000, max_windows=3)
"""To choose limits on iterations, and for the figure that estimates are compared with."""

SHORT = fixed_workload(prompt_tokens=256, output_tokens=64)
CHAT = fixed_workload(prompt_tokens=64, output_tokens=128)


class Placed(msgspec.Struct, frozen=True):
    """A placement and the tokens/s that it delivers by simulation."""

    question: str
    placement: Placement
    simulated_tokens_per_s: float


def questions() -> Iterator[tuple[str, Capacities]]:
    """Name, and cluster with workload and requests in flight."""
    trace = trace_workload(DATA / "azure_llm_2023_conv.csv")
    talk = Workload(source=trace.source, lengths=tuple(x for x in trace.lengths if x[0] <= 2048 and x[1] <= 1024))
    yield "8 nodes, 40 layers, chat", Capacities(_measured(8, 40, seed=0), CHAT, concurrency=32)
    yield "12 nodes, 40 layers, short", Capacities(_measured(12, 40, seed=1), SHORT, concurrency=64)
    yield "16 nodes, short", Capacities(_measured(16, 60, seed=2), SHORT, concurrency=128)
    yield "24 nodes, short", Capacities(_measured(24, 80, seed=3), SHORT, concurrency=240)
    yield "24 nodes, three regions, short", Capacities(_measured(24, 80, seed=4, num_regions=3), SHORT, concurrency=128)
    yield "32 nodes, conversations", Capacities(_measured(32, 80, seed=5), talk, concurrency=64)
    yield "42 nodes, short", Capacities(_measured(42, 80, seed=6), SHORT, concurrency=256)
    yield "60 nodes, chat", Capacities(_measured(60, 80, seed=7), CHAT, concurrency=512)
    for num_nodes, num_regions in ((16, 1), (36, 3)):
        tables = make_cluster(num_nodes=num_nodes, num_types=4, num_regions=num_regions, seed=num_nodes)
        yield f"{num_nodes} nodes with tables, {num_regions} regions", Capacities(tables, SHORT, concurrency=200)


def _measured(num_nodes: int, num_layers: int, *, seed: int, num_regions: int = 1) -> ClusterProfile:
    """Nodes of the published kinds with published timings, in proportions drawn at random."""
    published = load_record(DATA / "clusters" / "published24-llama70b.json", ClusterProfile)
    timed = with_imported_costs(published, DATA / "gpu_profiles")
    made = make_cluster(num_nodes=num_nodes, num_types=3, num_regions=num_regions, seed=seed, num_layers=num_layers)
    rng = random.Random(seed)
    kinds = {node.device.name: node for node in timed.nodes}
    drawn = [kinds[name] for name in rng.choices(sorted(kinds), weights=(3, 2, 2), k=num_nodes)]
    nodes = tuple(
        msgspec.structs.replace(kind, name=old.name, region=old.region)
        for old, kind in zip(made.nodes, drawn, strict=True)
    )
    model = msgspec.structs.replace(timed.model, num_layers=num_layers)
    return msgspec.structs.replace(made, model=model, nodes=nodes, default_link=DefaultLink(1e9, 1e-3))


def placements(capacities: Capacities, *, seed: int) -> Iterator[Placement]:
    """Baselines, stages that fill evenly, and ranges drawn at random: different ones that carry a flow, without end."""
    rng = random.Random(seed)
    found = [rule(capacities) for rule in METHODS.values()]
    for width in SIDE_BY_SIDE:
        chains = list(stacks(capacities, hop_s=1e-3, most_side_by_side=width))
        found += rng.sample(chains, min(2, len(chains)))
    seen: list[Placement] = []
    for placement in itertools.chain(found, (_drawn(capacities, rng) for _ in itertools.count())):
        if not placement or any(not capacities.can_hold(name, held) for name, held in placement.items()):
            continue
        if placement not in seen and max_flow(capacities, placement).tokens_per_s > 0:
            seen.append(placement)
            yield placement


def _drawn(capacities: Capacities, rng: random.Random) -> Placement:
    """Every node, in random order, a range of random length at the layers that fewest hold."""
    holding = [0.0] * capacities.model.num_layers
    placement: Placement = {}
    for name in rng.sample(sorted(capacities.nodes), len(capacities.nodes)):
        length = max(1, round(capacities.max_layers(name) * rng.uniform(0.6, 1.0)))
        start = min(range(len(holding) - length + 1), key=lambda at: max(holding[at : at + length]) + at * 1e-9)
        placement[name] = LayerRange(start, start + length)
        for layer in range(start, start + length):
            holding[layer] += capacities.tokens_per_s(name, placement[name])
    return placement


def record(file: Path) -> None:
    """Simulate the placements of all questions and write them to a file; those that are in it already stay."""
    kept = msgspec.json.decode(file.read_bytes(), type=list[Placed]) if file.exists() else []
    for number, (name, capacities) in enumerate(questions()):
        if any(one.question == name for one in kept):
            continue
        began = time.process_time()
        of_this: list[Placed] = []
        for placement in itertools.islice(placements(capacities, seed=number), MOST_TRIED):
            flow = max_flow(capacities, placement, spread=True)
            limits = best_limits(capacities, placement, flow, Budget(10**9), thorough=False, effort=LIMITS)
            if limits is None:
                continue
            held, asked = flow.used(placement), capacities.concurrency
            settled = simulated(capacities, held, flow, asked, batching=limits.batching, effort=SETTLED)
            found = limits.expected if settled is None else settled.expected
            of_this.append(Placed(name, placement, found.total_tokens_per_s))
            if len(of_this) == EACH:
                break
        kept += of_this
        file.write_bytes(msgspec.json.encode(kept))
        print(f"{name}: {len(of_this)} placements, {time.process_time() - began:.0f} s", file=sys.stderr, flush=True)


def rank(file: Path) -> None:
    """Print a row for each question, and one for all."""
    kept = msgspec.json.decode(file.read_bytes(), type=list[Placed])
    print("| question | placements | rank correlation | median error | largest | best by estimate loses | ms |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    correlations, errors, lost, spent = [], [], [], []
    for name, capacities in questions():
        of_this = [one for one in kept if one.question == name]
        if not of_this:
            continue
        estimated, began = [], time.process_time()
        for one in of_this:
            flow = max_flow(capacities, one.placement, spread=True)
            held = flow.used(one.placement)
            found = predict_analytically(capacities, held, flow.links, capacities.concurrency)
            estimated.append(found.total_tokens_per_s)
        spent.append((time.process_time() - began) / len(of_this))
        simulated = [one.simulated_tokens_per_s for one in of_this]
        correlations.append(float(spearmanr(estimated, simulated).statistic))
        off = [abs(guess / truth - 1) for guess, truth in zip(estimated, simulated, strict=True)]
        errors += off
        lost.append(1 - simulated[estimated.index(max(estimated))] / max(simulated))
        print(
            f"| {name} | {len(of_this)} | {correlations[-1]:.2f} | {statistics.median(off):.1%} | {max(off):.1%} "
            f"| {lost[-1]:.1%} | {1e3 * spent[-1]:.1f} |"
        )
    print(
        f"| all | {len(kept)} | {statistics.fmean(correlations):.2f} | {statistics.median(errors):.1%} "
        f"| {max(errors):.1%} | {statistics.fmean(lost):.1%} | {1e3 * statistics.fmean(spent):.1f} |"
    )


if __name__ == "__main__":
    {"record": record, "rank": rank}[sys.argv[1]](Path(sys.argv[2]))
