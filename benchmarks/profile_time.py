"""What each minute of profiling a node buys: held-out error of the fit after every round.

``python -m benchmarks.profile_time MODEL [--budget-s S] [--threads N] [--memory BYTES] [--svg FILE]``

The held-out batches' times are those of the whole run; the fit at a round has seen the blocks up to that round.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np

from helixbench.profiler.cost.fit import fit_cost, relative_errors
from helixbench.profiler.cost.measured import CostSample
from helixbench.profiler.cost.model import GATHER_UP_TO_TOKENS
from helixbench.profiler.measure.sampler import Block, sample_of
from helixbench.reference_server.profiling import node as self_profile
from helixbench.reference_server.profiling.local import NodeProfileConfig, agent_here

Reached = tuple[float, int, float, float]  # seconds, blocks, median and 90th percentile of the held-out error
WIDTH, HEIGHT, LEFT, BOTTOM = 560, 260, 52, 36


def main() -> None:
    """Measure, print the table, draw it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--budget-s", type=float, default=120.0)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--memory", type=float, default=130e6)
    parser.add_argument("--svg", type=Path, default=None)
    asked = parser.parse_args()
    config = NodeProfileConfig(
        model=asked.model,
        dtype="float32",
        name="node",
        memory_bytes=asked.memory,
        threads=asked.threads,
        budget_s=asked.budget_s,
    )
    rounds: list[tuple[float, tuple[Block, ...]]] = []
    with agent_here(config) as (agent, command, _):
        began = time.perf_counter()
        measured = self_profile.profile(
            agent,
            command,
            on_block=lambda _done, _expected: None,
            on_round=lambda blocks: rounds.append((time.perf_counter() - began, blocks)),
        )
    held_out = [sample for sample in measured.samples if sample.held_out]
    reached = [_reached(seconds, blocks, held_out, config.max_batch_tokens) for seconds, blocks in rounds]
    print("| seconds | blocks | held-out error median | p90 |\n| --- | --- | --- | --- |")
    for seconds, blocks, median, p90 in reached:
        print(f"| {seconds:.0f} | {blocks} | {median:.1%} | {p90:.1%} |")
    if asked.svg is not None:
        asked.svg.write_text(_svg(reached), encoding="utf-8")


def _reached(
    seconds: float,
    blocks: tuple[Block, ...],
    held_out: list[CostSample],
    max_batch_tokens: int,
) -> Reached:
    of_point: dict[object, list[Block]] = {}
    for block in blocks:
        of_point.setdefault(block.point, []).append(block)
    samples = [sample_of(taken[0].point, taken) for taken in of_point.values()]
    cost = fit_cost(
        samples,
        workspace_bytes=0,
        max_batch_tokens=max_batch_tokens,
        source="so far",
        gather_up_to_tokens=GATHER_UP_TO_TOKENS["cpu"],
    )
    errors = relative_errors(cost.stage, held_out)
    return seconds, len(blocks), float(np.median(errors)), float(np.percentile(errors, 90))


def _svg(reached: list[Reached]) -> str:
    last_s, highest = max(r[0] for r in reached), max(0.05, *(r[3] for r in reached)) * 1.1

    def at(seconds: float, error: float) -> str:
        x = LEFT + seconds / last_s * (WIDTH - LEFT - 12)
        return f"{x:.1f},{HEIGHT - BOTTOM - error / highest * (HEIGHT - BOTTOM - 12):.1f}"

    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif">']
    parts.append(f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>')
    for tick in range(5):
        error = highest * tick / 4
        x, y = at(0, error).split(",")
        parts.append(f'<line x1="{x}" y1="{y}" x2="{WIDTH - 12}" y2="{y}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y}" font-size="11" text-anchor="end">{error:.1%}</text>')
        x = at(last_s * tick / 4, 0).split(",")[0]
        parts.append(
            f'<text x="{x}" y="{HEIGHT - 18}" font-size="11" text-anchor="middle">{last_s * tick / 4:.0f} s</text>'
        )
    for column, colour, name in ((2, "#1a6", "median"), (3, "#c52", "90th percentile")):
        points = " ".join(at(r[0], r[column]) for r in reached)
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        place = f'x="{WIDTH - 12}" y="{14 * (column - 1)}" text-anchor="end"'
        parts.append(f'<text {place} font-size="12" fill="{colour}">{name}</text>')
    title = "held-out error of the fit over the time that a node is profiled"
    parts.append(f'<text x="{LEFT}" y="{HEIGHT - 4}" font-size="11">{title}</text></svg>')
    return "\n".join(parts)


if __name__ == "__main__":
    main()
