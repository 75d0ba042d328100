"""Where the time of a node's stage goes: its layers one by one, as sections of a summary and as a heat map."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from helixbench.profiler.cluster import ClusterProfile, Node
from helixbench.profiler.cost.measured import IterationTime, LayerTimes, PartTime
from helixbench.reports.formatting import flop_rate, percent, seconds, size
from helixbench.reports.render.document import Row, Section, section

COLUMNS = ("part", "batch", ">time", ">bytes/s", ">of copy", ">FLOP/s", ">of GEMM")


class HeatMap(NamedTuple):
    """Seconds of one decode layer, by sequences (rows) and tokens that each attends to (columns)."""

    kind: str
    sequences: tuple[int, ...]
    contexts: tuple[int, ...]
    seconds: dict[tuple[int, int], float]  # (sequences, context) -> seconds; some are missing

    def warmth(self, seconds_: float) -> float:
        """0 for the shortest time of the map, 1 for the longest, in between by its logarithm."""
        low, high = (math.log(each(self.seconds.values())) for each in (min, max))
        return (math.log(seconds_) - low) / (high - low) if high > low else 0.0


def layer_times_of(node: Node) -> LayerTimes | None:
    """Where the time of the node's stage goes, if that was measured."""
    return node.cost.quality.layer_times if node.cost is not None and node.cost.quality is not None else None


def layer_sections(profile: ClusterProfile) -> Iterator[Section]:
    """One section for each node whose layers were timed."""
    for node in profile.nodes:
        times = layer_times_of(node)
        if times is None:
            continue
        widest = max(times.iterations, key=lambda each: each.wall_s - each.layers_s)
        yield section(
            f"Layers of {node.name}",
            f"one of each part, by {times.clock}",
            COLUMNS,
            (part_row(part, times) for part in times.parts),
            lines=(
                f"at most: one large copy {size(times.copy_bytes_per_s)}/s, one large matrix product "
                f"{flop_rate(times.gemm_flops_per_s)}",
                f"beside its layers a forward pass takes up to {seconds(widest.wall_s - widest.layers_s)} "
                f"({batch_name(widest)})",
            ),
        )


def part_row(part: PartTime, times: LayerTimes) -> Row:
    """One part under ``COLUMNS``."""
    bytes_per_s, flops_per_s = part.num_bytes / part.median_s, part.flops / part.median_s
    return (
        f"{part.part} ({part.kind})" if part.kind else part.part,
        batch_name(part),
        seconds(part.median_s),
        f"{size(bytes_per_s)}/s",
        percent(bytes_per_s / times.copy_bytes_per_s),
        *((flop_rate(flops_per_s), percent(flops_per_s / times.gemm_flops_per_s)) if part.flops else ("", "")),
    )


def batch_name(batch: PartTime | IterationTime) -> str:
    """``decode 8 x 1024``: sequences, and tokens that each attends to; ``prefill 1 x 512``; what matters of it."""
    if isinstance(batch, PartTime) and batch.part == "embedding":
        return f"{batch.sequences * batch.new_tokens} tokens"
    if isinstance(batch, PartTime) and batch.part in ("head", "sampling"):
        return f"{batch.sequences} rows"
    if batch.new_tokens == 1:
        return f"decode {batch.sequences} x {batch.past_tokens + 1}"
    return f"prefill {batch.sequences} x {batch.new_tokens}"


def heat_maps(times: LayerTimes) -> list[HeatMap]:
    """One for each kind of layer."""
    decodes: dict[str, dict[tuple[int, int], float]] = {}  # kind -> (sequences, context) -> seconds
    for part in times.parts:
        if part.part == "layer" and part.new_tokens == 1:
            decodes.setdefault(part.kind, {})[part.sequences, part.past_tokens + 1] = part.median_s
    return [
        HeatMap(kind, tuple(sorted({s for s, _ in found})), tuple(sorted({c for _, c in found})), found)
        for kind, found in decodes.items()
    ]
