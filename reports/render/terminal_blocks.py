"""The blocks that terminal summaries are made of: one visual language for profile, plan, run and comparison."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from helixbench.reports.render.text import layer_bar, link_name, number, percent, share_bar
from helixbench.solver.problem.plan import LayerRange, Plan

BAR = 14
LAYER_BAR = 32
# More rows than this say less, not more: the least used are counted, not listed.
MAX_ROWS, MAX_LINKS = 24, 12
SATURATED = 0.999


def block(title: str, about: str | Text, *body: RenderableType) -> RenderableType:
    """A heading with what the block shows, and the block, indented."""
    heading = Text.assemble((title, "bold"), "  " if about else "", about)
    return Group("", heading, *(Padding(part, (0, 0, 0, 2), expand=False) for part in body))


def facts(title: str, lines: Iterable[str]) -> RenderableType:
    """A heading with lines of text under it; nothing where there are no lines."""
    body = [Text(line) for line in dict.fromkeys(lines) if line]
    return block(title, "", *body) if body else Text("", end="")


def table(*columns: str, rows: Iterable[Sequence[RenderableType]]) -> Table:
    """Columns without rules; one without a single cell is left out.

    A name that starts with ``>`` is right-aligned, one that starts with ``=`` holds bars: neither is ever broken. Every
    other cell is folded where it is too long, never cut.
    """
    lines = [tuple(row) for row in rows]
    used = [i for i in range(len(columns)) if any(str(line[i]) for line in lines)]
    names = [columns[i].lstrip(">=") for i in used]
    grid = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_header=any(names))
    for name, i in zip(names, used, strict=True):
        kind = columns[i][:1]
        grid.add_column(
            name,
            justify="right" if kind == ">" else "left",
            overflow="fold",
            no_wrap=kind in (">", "="),
            header_style="italic",
        )
    for line in lines:
        grid.add_row(*(line[i] for i in used))
    return grid


def placement(layers: Mapping[str, LayerRange], num_layers: int, about: Mapping[str, str]) -> RenderableType:
    """One row per node over ``[0, num_layers)``, in the order of the layers."""
    width = LAYER_BAR if num_layers > LAYER_BAR else num_layers * max(1, LAYER_BAR // num_layers)
    rows = [
        (name, layer_bar(held, num_layers, width), str(held), about.get(name, ""))
        for name, held in sorted(layers.items(), key=lambda item: (item[1], item[0]))
    ]
    return block("PLACEMENT", f"over the layers [0,{num_layers})", table("", "=", "=", "", rows=rows))


def flows(plan: Plan) -> RenderableType:
    """Nodes, then links, each with its flow against its capacity; the tightest carry the word ``bottleneck``."""
    nodes = [(name, flow.flow_tokens_per_s, flow.capacity_tokens_per_s) for name, flow in plan.nodes.items()]
    links = [(link_name(flow.src, flow.dst), flow.flow_tokens_per_s, flow.capacity_tokens_per_s) for flow in plan.flows]
    cut = "; ".join(plan.predicted.bottleneck)
    return block(
        "FLOW",
        "through nodes and links against capacity, tokens/s",
        table(
            "",
            "=",
            ">flow",
            ">capacity",
            ">use",
            "=",
            rows=[*_flow_rows(nodes, MAX_ROWS), *_flow_rows(links, MAX_LINKS)],
        ),
        *_left_out(len(nodes) - MAX_ROWS, "nodes"),
        *_left_out(len(links) - MAX_LINKS, "links"),
        *([Text(f"bottleneck (min cut): {cut}", style="bold")] if cut else []),
    )


def _flow_rows(entries: Sequence[tuple[str, float, float]], most: int) -> list[tuple[RenderableType, ...]]:
    """The most used first, ``most`` at most."""
    ranked = sorted(entries, key=lambda entry: (-use(entry[1], entry[2]), entry[0]))
    return [_flow_row(*entry) for entry in ranked[:most]]


def _flow_row(name: str, flow: float, capacity: float) -> tuple[RenderableType, ...]:
    share = use(flow, capacity)
    is_bottleneck = share >= SATURATED
    cells = (name, share_bar(share, BAR), number(flow), number(capacity), _use_percent(share))
    style = "bold" if is_bottleneck else ""
    return (*(Text(cell, style=style) for cell in cells), Text("bottleneck" if is_bottleneck else "", style=style))


def _use_percent(share: float) -> str:
    return "<1 %" if 0 < share < 0.01 else percent(share)


def use(flow: float, capacity: float) -> float:
    """Flow over capacity; flow over no capacity at all is above every limit."""
    if capacity > 0:
        return flow / capacity
    return float("inf") if flow > 0 else 0.0


def _left_out(more: int, what: str) -> list[Text]:
    return [Text(f"… and {more} more {what}, used less than those above")] if more > 0 else []


def scale_bars(
    rows: Sequence[tuple[str, float | None, Sequence[str]]], *remarks: str, width: int = BAR
) -> RenderableType:
    """Values of one kind as bars on one scale: ``(name, value, remarks)``, a remark for each of those columns."""
    top = max((value for _, value, _ in rows if value is not None), default=0.0)
    return table(
        "=",
        "=",
        ">",
        *remarks,
        rows=[
            (name, share_bar(value / top if value is not None and top else 0.0, width), number(value), *cells)
            for name, value, cells in rows
        ],
    )
