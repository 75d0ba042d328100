"""Several profiles of one testbed: by what the expected throughput of one plan varies, and which part moves it most.

``python -m benchmarks.profile_repeat MODEL FOLDER [--times N] [--budget-s S] [--testbed FILE]``

The first profile is solved; its placement is then asked for on every profile (``solve --pin``). For the cause, each
part of the first profile (a node's cost, the links, the coordinator) is exchanged alone for that of each other one.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec

from helixbench.profiler.cluster import ClusterProfile
from helixbench.records import load_record, save_record
from helixbench.solver.problem.plan import Plan

PROMPT_TOKENS, OUTPUT_TOKENS, CONCURRENCY = 32, 32, 16


def main() -> None:
    """Profile, solve, exchange, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--budget-s", type=float, default=100.0)
    parser.add_argument("--testbed", type=Path, default=None)
    asked = parser.parse_args()
    profiles = []
    for number in range(asked.times):
        file = asked.folder / f"cluster{number}.json"
        if not file.exists():
            testbed = [] if asked.testbed is None else ["--testbed", str(asked.testbed)]
            options = ["--model", asked.model, "--budget-s", str(asked.budget_s), "-o", str(file), *testbed]
            _helixbench("profile", *options)
        profiles.append(load_record(file, ClusterProfile))
    plan = _solve(asked.folder, profiles[0], {})
    pins = {name: f"[{held.start},{held.end})" for name, held in plan.placement.items()}
    expected = [_expected(_solve(asked.folder, profile, pins)) for profile in profiles]
    base = _expected(_solve(asked.folder, profiles[0], pins))
    print(f"placement {pins}")
    for number, value in enumerate(expected):
        print(f"profile {number}: expected {value:.1f} tokens/s ({value / base - 1:+.1%})")
    print(f"range {(max(expected) - min(expected)) / (sum(expected) / len(expected)):.1%} of the mean")
    for number, other in enumerate(profiles[1:], start=1):
        moved = {
            part: _expected(_solve(asked.folder, mixed, pins)) / base - 1
            for part, mixed in _exchanged(profiles[0], other)
        }
        ordered = sorted(moved.items(), key=lambda item: -abs(item[1]))
        print(f"profile {number}: " + ", ".join(f"{part} {value:+.1%}" for part, value in ordered))


def _exchanged(base: ClusterProfile, other: ClusterProfile) -> Iterator[tuple[str, ClusterProfile]]:
    for index, node in enumerate(base.nodes):
        nodes = [*base.nodes]
        nodes[index] = msgspec.structs.replace(node, cost=other.node(node.name).cost)
        yield f"cost of {node.name}", msgspec.structs.replace(base, nodes=tuple(nodes))
    yield "links", msgspec.structs.replace(base, links=other.links)
    yield "coordinator", msgspec.structs.replace(base, coordinator=other.coordinator)


def _solve(folder: Path, profile: ClusterProfile, pins: dict[str, str]) -> Plan:
    cluster, plan = folder / "asked-cluster.json", folder / "asked-plan.json"
    save_record(cluster, profile)
    load = ["--prompt-tokens", str(PROMPT_TOKENS), "--output-tokens", str(OUTPUT_TOKENS)]
    pinned = [word for name, held in pins.items() for word in ("--pin", f"{name}={held}")]
    limit = ["--time-limit-s", "20", "--concurrency", str(CONCURRENCY)]
    _helixbench("solve", str(cluster), *load, *limit, *pinned, "-o", str(plan))
    return load_record(plan, Plan)


def _expected(plan: Plan) -> float:
    return next(e.total_tokens_per_s for e in plan.predicted.expected if e.concurrency == CONCURRENCY)


def _helixbench(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "helixbench", *words], check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
