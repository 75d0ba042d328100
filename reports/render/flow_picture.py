"""Geometry of the flow picture: nodes as boxes over the layers that they hold, flows as arrows between them.

The horizontal axis is the model, layer 0 at the left. Every layer at which some node's range begins or ends opens a
gap, in which arrows run; so a box that spans a gap holds the layers on both of its sides. Rows keep boxes apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import msgspec

from helixbench.profiler.cluster import COORDINATOR
from helixbench.solver.problem.plan import LayerRange, Plan

GAP = 74.0
MARGIN = 84.0
BOX_HEIGHT = 46.0
ROW_HEIGHT = 64.0
TOP = 34.0
MIN_SEGMENT = 112.0
LAYERS_WIDTH = 420.0
MAX_STROKE = 16.0
MIN_STROKE = 1.5
# Steps of use of capacity; each has a colour on the page and is written beside the arrow or in the box as well.
USE_STEPS = (0.25, 0.5, 0.75, 0.999)


class Box(msgspec.Struct, frozen=True, kw_only=True):
    """A node: where it is drawn, what it holds and how much of its capacity is used (``step`` of ``USE_STEPS``).

    ``kind`` indexes ``FlowPicture.kinds``.
    """

    name: str
    layers: LayerRange
    about: str
    region: str
    kind: int
    flow_tokens_per_s: float
    use: float
    step: int
    x: float
    y: float
    width: float


class Arrow(msgspec.Struct, frozen=True, kw_only=True):
    """A flow: an SVG path, its stroke width, where its label goes and where it ends.

    ``is_late`` marks one that enters its node's range later than at the first layer.
    """

    src: str
    dst: str
    flow_tokens_per_s: float
    use: float
    step: int
    path: str
    stroke: float
    label_x: float
    label_y: float
    end_x: float
    end_y: float
    is_late: bool


class Tick(msgspec.Struct, frozen=True, kw_only=True):
    """A layer boundary on the axis."""

    layer: int
    x: float


class FlowPicture(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that the template draws, in pixels of the picture's own coordinates.

    ``kinds`` are the devices and regions that boxes are told apart by, empty where all are alike.
    """

    width: float
    height: float
    middle_y: float
    kinds: tuple[str, ...]
    boxes: tuple[Box, ...]
    arrows: tuple[Arrow, ...]
    ticks: tuple[Tick, ...]


def flow_picture(
    plan: Plan, *, about: Mapping[str, str] | None = None, regions: Mapping[str, str] | None = None
) -> FlowPicture:
    """Lay out a plan.

    Args:
        plan: what to draw.
        about: node -> its device.
        regions: node -> the place that shares fast links; nodes of one region are drawn next to each other.
    """
    about, regions = about or {}, regions or {}
    axis = _axis(plan)
    rows = _rows(plan, regions)
    kinds = sorted({_kind(name, about, regions) for name in plan.placement})
    boxes = {name: _box(plan, name, rows[name], axis, about, regions, kinds) for name in plan.placement}
    num_rows = 1 + max(rows.values())
    height = TOP + num_rows * ROW_HEIGHT + 8
    middle = TOP + (num_rows * ROW_HEIGHT - (ROW_HEIGHT - BOX_HEIGHT)) / 2
    width = max(right for _, right in axis.values()) + MARGIN
    return FlowPicture(
        width=width,
        height=height,
        middle_y=middle,
        kinds=tuple(kinds) if len(kinds) > 1 else (),
        boxes=tuple(boxes[name] for name in sorted(boxes, key=lambda name: (rows[name], boxes[name].x))),
        arrows=_arrows(plan, boxes, axis, middle),
        ticks=tuple(Tick(layer=layer, x=(left + right) / 2) for layer, (left, right) in axis.items()),
    )


def use_step(share: float) -> int:
    """Which step of ``USE_STEPS`` a use of capacity falls in; the last one is a bottleneck."""
    return sum(share >= step for step in USE_STEPS)


def _axis(plan: Plan) -> dict[int, tuple[float, float]]:
    """Layer boundary -> (left, right) end of the gap that is drawn there."""
    cuts = sorted({0, plan.num_layers, *(end for held in plan.placement.values() for end in (held.start, held.end))})
    axis = {0: (MARGIN, MARGIN + GAP)}
    for start, end in pairwise(cuts):
        left = axis[start][1] + max(MIN_SEGMENT, LAYERS_WIDTH * (end - start) / plan.num_layers)
        axis[end] = (left, left + GAP)
    return axis


def _rows(plan: Plan, regions: Mapping[str, str]) -> dict[str, int]:
    """Node -> row: the first row that is free over the node's layers, the largest flows first within a region."""
    ends: list[list[LayerRange]] = []
    rows: dict[str, int] = {}
    order = sorted(
        plan.placement,
        key=lambda name: (regions.get(name, ""), -plan.nodes[name].flow_tokens_per_s, plan.placement[name], name),
    )
    for name in order:
        held = plan.placement[name]
        row = next((i for i, taken in enumerate(ends) if not any(_overlap(held, other) for other in taken)), len(ends))
        if row == len(ends):
            ends.append([])
        ends[row].append(held)
        rows[name] = row
    return rows


def _kind(name: str, about: Mapping[str, str], regions: Mapping[str, str]) -> str:
    return ", ".join(filter(None, [about.get(name, ""), regions.get(name, "")])) or "unknown device"


def _overlap(one: LayerRange, other: LayerRange) -> bool:
    return one.start < other.end and other.start < one.end


def _box(
    plan: Plan,
    name: str,
    row: int,
    axis: Mapping[int, tuple[float, float]],
    about: Mapping[str, str],
    regions: Mapping[str, str],
    kinds: list[str],
) -> Box:
    held, flow = plan.placement[name], plan.nodes[name]
    share = flow.flow_tokens_per_s / flow.capacity_tokens_per_s if flow.capacity_tokens_per_s else 0.0
    left, right = axis[held.start][1], axis[held.end][0]
    return Box(
        name=name,
        layers=held,
        about=about.get(name, ""),
        region=regions.get(name, ""),
        kind=kinds.index(_kind(name, about, regions)),
        flow_tokens_per_s=flow.flow_tokens_per_s,
        use=share,
        step=use_step(share),
        x=left,
        y=TOP + row * ROW_HEIGHT,
        width=right - left,
    )


def _arrows(
    plan: Plan, boxes: Mapping[str, Box], axis: Mapping[int, tuple[float, float]], middle: float
) -> tuple[Arrow, ...]:
    """Widest first, so that a narrow one is never hidden under a wide one."""
    flows = sorted((flow for flow in plan.flows if flow.flow_tokens_per_s > 0), key=lambda f: -f.flow_tokens_per_s)
    top = max((flow.flow_tokens_per_s for flow in flows), default=1.0)
    strokes = {(f.src, f.dst): max(MIN_STROKE, MAX_STROKE * f.flow_tokens_per_s / top) for f in flows}
    middles = {name: box.y + BOX_HEIGHT / 2 for name, box in boxes.items()} | {COORDINATOR: middle}
    leaves = _ports([(src, dst) for src, dst in strokes], strokes, middles)
    enters = _ports([(dst, src) for src, dst in strokes], {(d, s): w for (s, d), w in strokes.items()}, middles)
    arrows = []
    for flow in flows:
        x1 = MARGIN if flow.src == COORDINATOR else boxes[flow.src].x + boxes[flow.src].width
        x2, is_late = _entry_x(plan, boxes, axis, flow.src, flow.dst)
        y1, y2 = leaves[(flow.src, flow.dst)], enters[(flow.dst, flow.src)]
        share = flow.flow_tokens_per_s / flow.capacity_tokens_per_s if flow.capacity_tokens_per_s else 0.0
        bend = max(18.0, (x2 - x1) / 2)
        arrows.append(
            Arrow(
                src=flow.src,
                dst=flow.dst,
                flow_tokens_per_s=flow.flow_tokens_per_s,
                use=share,
                step=use_step(share),
                path=f"M{x1:.1f} {y1:.1f} C{x1 + bend:.1f} {y1:.1f} {x2 - bend:.1f} {y2:.1f} {x2:.1f} {y2:.1f}",
                stroke=strokes[(flow.src, flow.dst)],
                label_x=(x1 + x2) / 2,
                label_y=(y1 + y2) / 2,
                end_x=x2,
                end_y=y2,
                is_late=is_late,
            )
        )
    return tuple(arrows)


def _ports(
    ends: list[tuple[str, str]], strokes: Mapping[tuple[str, str], float], middles: Mapping[str, float]
) -> dict[tuple[str, str], float]:
    """(node, other end) -> height at which the arrow meets the node: side by side, ordered by where they go."""
    ports: dict[tuple[str, str], float] = {}
    for node in dict.fromkeys(node for node, _ in ends):
        own = sorted((end for end in ends if end[0] == node), key=lambda end: (middles[end[1]], end[1]))
        y = middles[node] - sum(strokes[end] for end in own) / 2
        for end in own:
            ports[end] = y + strokes[end] / 2
            y += strokes[end]
    return ports


def _entry_x(
    plan: Plan, boxes: Mapping[str, Box], axis: Mapping[int, tuple[float, float]], src: str, dst: str
) -> tuple[float, bool]:
    """The box's left side, or, where a request enters later than its first layer, that layer inside the box."""
    if dst == COORDINATOR:
        return max(right for _, right in axis.values()), False
    if src != COORDINATOR and plan.placement[src].end > plan.placement[dst].start:
        return axis[plan.placement[src].end][1], True
    return boxes[dst].x, False
