"""Faults on an emulated testbed, one run of real processes each: what clients saw, and the throughput after each fault.

    python -m benchmarks.live_faults plan.json --model MODEL --testbed TESTBED -o FOLDER [--schedules N]

A seed draws each schedule. Runs that are in the folder already are kept; the table is written after each.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import subprocess
import sys
from pathlib import Path

from helixbench.records import load_record
from helixbench.reference_server.run_log import Happened, RunLog
from helixbench.solver.problem.plan import Plan

FAULT_S, MENDED_S, DURATION_S = 35.0, 65.0, 85.0
KINDS = ("kill", "freeze", "slow", "cut", "kill", "slow", "freeze for 1 s", "rate")


def schedule(plan: Plan, seed: int) -> list[dict[str, object]]:
    """A fault, and for most kinds its end."""
    draw = random.Random(f"faults {seed}")
    kind, node = KINDS[seed % len(KINDS)], draw.choice(sorted(plan.placement))
    links = [(flow.src, flow.dst) for flow in plan.flows if "coordinator" not in (flow.src, flow.dst)]
    src, dst = draw.choice(links)
    if kind == "kill":
        return [event("kill", FAULT_S, node=node), event("join", MENDED_S, node=node)]
    if kind == "slow":
        factor = draw.choice([1.5, 2.0, 3.0])
        return [event("slow", FAULT_S, node=node, factor=factor), event("slow", MENDED_S, node=node, factor=1.0)]
    if kind == "cut":
        return [event("cut", FAULT_S, src=src, dst=dst), event("heal", MENDED_S, src=src, dst=dst)]
    if kind == "rate":
        return [event("rate", FAULT_S, src=src, dst=dst, factor=0.01)]
    resumed_s = FAULT_S + 1.0 if kind == "freeze for 1 s" else MENDED_S
    return [event("freeze", FAULT_S, node=node), event("resume", resumed_s, node=node)]


def event(kind: str, at_s: float, **fields: object) -> dict[str, object]:
    """As in a file of events."""
    return {"kind": kind, "at_s": at_s, **fields}


def run(arguments: argparse.Namespace, seed: int) -> None:
    """One run, unless it is there."""
    folder: Path = arguments.output / f"{seed:03d}"
    if (folder / "verdict.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    events = schedule(load_record(arguments.plan, Plan), seed)
    (folder / "events.json").write_text(json.dumps({"event": events}))
    command = [sys.executable, "-m", "helixbench"]
    bench = ["bench", arguments.plan, "--model", arguments.model, "--testbed", arguments.testbed]
    bench += ["--events", folder / "events.json", "--history", folder / "seen.jsonl", "--duration-s", DURATION_S]
    bench += ["--seed", seed, "-o", folder / "run.json"]
    with (folder / "bench.log").open("w") as log:
        subprocess.run([*command, *map(str, bench)], stdout=log, stderr=log, check=False)
    check = ["check", folder / "seen.jsonl", "--model", arguments.model, "--json"]
    judged = subprocess.run([*command, *map(str, check)], stdout=subprocess.PIPE, check=False)
    (folder / "verdict.json").write_bytes(judged.stdout)


def row(folder: Path) -> str:
    """A line of the table for each event of a run."""
    verdict = json.loads((folder / "verdict.json").read_text())
    log = load_record(folder / "run.json", RunLog)
    totals = [sum(getattr(one, how) for one in log.adaptation.recovered) for how in ("replayed", "prefilled", "moved")]
    bad = [verdict[fault] or 0 for fault in ("lost", "duplicated", "unknown", "wrong")]
    late = f"{100 * log.late_share:.2f}"
    lines = []
    for one in log.adaptation.events:
        cells = [folder.name, one.what, figure(one.detected_s, 2), figure(one.before_tokens_per_s)]
        cells += [figure(one.after_tokens_per_s), figure(one.predicted_tokens_per_s), figure(ratio_of(one), 3)]
        cells += ["/".join(map(str, totals)), f"{verdict['longest_gap_s']:.1f}", "/".join(map(str, bad)), late]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def ratio_of(one: Happened) -> float | None:
    """Throughput after an event over what was predicted for it."""
    if one.after_tokens_per_s is None or not one.predicted_tokens_per_s:
        return None
    return one.after_tokens_per_s / one.predicted_tokens_per_s


def figure(value: float | None, digits: int = 0) -> str:
    """The number, or a dash."""
    return "-" if value is None else f"{value:.{digits}f}"


def table(folder: Path) -> str:
    """All runs so far."""
    head = "| run | event | noticed, s | before | after | predicted | ratio | replayed/prefilled/moved | gap, s "
    head += "| lost/dup/unknown/wrong | late, % |"
    runs = [path.parent for path in sorted(folder.glob("*/verdict.json")) if (path.parent / "run.json").exists()]
    events = itertools.chain.from_iterable(load_record(one / "run.json", RunLog).adaptation.events for one in runs)
    ratios = [ratio for ratio in map(ratio_of, events) if ratio is not None]
    lines = [head, "|" + " --- |" * 11, *map(row, runs)]
    if ratios:
        median = statistics.median(ratios)
        lines.append(f"\nafter / predicted: median {median:.3f}, {min(ratios):.3f} to {max(ratios):.3f}")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--testbed", required=True)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--schedules", type=int, default=len(KINDS))
    arguments = parser.parse_args()
    for seed in range(arguments.schedules):
        run(arguments, seed)
        (arguments.output / "table.md").write_text(table(arguments.output))
    print(table(arguments.output))


if __name__ == "__main__":
    main()
