"""Records as self-contained pages: no network, for print and phones, light and dark.

Tables, bars and the flow picture are rendered by templates, so they read without JavaScript. Charts over time and of
latency are drawn by uPlot from the record that the page embeds: 51 kB for axes, a cursor and a legend, where Vega or
Plotly would add 0.8 to 4.5 MB to every page.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from typing import Any, TypeVar

import msgspec
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from helixbench.reference_server.run_log import RunLog
from helixbench.reports import formatting
from helixbench.reports.compare.change import Comparison
from helixbench.reports.loading import Record
from helixbench.reports.render.adaptation import EVENT_COLUMNS, event_row
from helixbench.reports.render.flow_picture import USE_STEPS, FlowPicture, flow_picture
from helixbench.reports.render.layers import COLUMNS, heat_maps, layer_times_of, part_row
from helixbench.reports.render.summaries import client_rows
from helixbench.reports.verdict.causes import relative
from helixbench.reports.verdict.client import ClientResult
from helixbench.reports.verdict.integrity import intervals_in_window, timeline_intervals, tokens_of
from helixbench.reports.verdict.validate import validate
from helixbench.solver.problem.plan import Plan

# Rows of the tables that repeat a chart; consecutive intervals are merged to stay below.
MAX_TIMELINE_ROWS = 48
MAX_NODE_ROWS = 24

Row = Mapping[str, str | float | bool | None]
T = TypeVar("T")


def html_page(
    record: Record,
    *,
    comparison: Comparison | None = None,
    base: Record | None = None,
    client: ClientResult | None = None,
) -> str:
    """The page of a record.

    Args:
        record: a run, a plan or a cluster profile.
        comparison: its changes against ``base``, listed first.
        base: the record that it is compared with, of the same kind. Its latencies join those of a run, its flow picture
            that of a plan.
        client: what another client measured of a run's plan.
    """
    template, own = _page(record, client)
    context: dict[str, Any] = {
        "provenance": record.provenance,
        "comparison": comparison,
        "base": base,
        "base_picture": _plan_picture(base) if isinstance(base, Plan) else None,
        **own,
    }
    embedded = {"record": record, "verdict": own.get("verdict"), "base": base, "comparison": comparison}
    return _render(template, records={name: one for name, one in embedded.items() if one is not None}, **context)


def _page(record: Record, client: ClientResult | None = None) -> tuple[str, dict[str, Any]]:
    """Template and its context."""
    if isinstance(record, RunLog):
        verdict, plan = validate(record, client=client), record.plan
        return "run.html.j2", {
            "title": f"{plan.model}: {verdict.outcome}",
            "run": record,
            "plan": plan,
            "verdict": verdict,
            "picture": flow_picture(plan, about=record.device_names, regions=record.regions),
            "devices": record.device_names,
            "timeline": _timeline_rows(record),
            "node_timeline": _node_rows(record),
            "throughput": _throughput_in_words(record),
            "events": [(event, event_row(event)) for event in record.adaptation.events],
            "event_columns": EVENT_COLUMNS,
            "client_rows": () if client is None else client_rows(verdict, client),
        }
    if isinstance(record, Plan):
        return "plan.html.j2", {
            "title": f"{record.model}: plan",
            "plan": record,
            "picture": _plan_picture(record),
            "devices": _devices_of(record),
        }
    layers = [
        (node.name, times, heat_maps(times), [part_row(part, times) for part in times.parts])
        for node in record.nodes
        if (times := layer_times_of(node)) is not None
    ]
    return "profile.html.j2", {
        "title": f"{record.model.name}: cluster",
        "profile": record,
        "layers": layers,
        "layer_columns": COLUMNS,
    }


def _plan_picture(plan: Plan) -> FlowPicture:
    regions = {name: use.region for name, use in plan.nodes.items() if use.region}
    return flow_picture(plan, about=_devices_of(plan), regions=regions)


def _devices_of(plan: Plan) -> dict[str, str]:
    return {name: use.device for name, use in plan.nodes.items() if use.device}


def script_json(record: msgspec.Struct) -> Markup:
    """JSON for a script element, escaped so that it cannot contain ``</script>`` or a comment."""
    encoded = msgspec.json.encode(record).decode()
    for char in "<>&\u2028\u2029":
        encoded = encoded.replace(char, f"\\u{ord(char):04x}")
    return Markup(encoded)


def _render(template: str, **context: object) -> str:
    environment = Environment(
        loader=PackageLoader("helixbench.reports.render", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        number=formatting.number,
        interval=formatting.interval,
        seconds=formatting.seconds,
        percent=formatting.percent,
        signed=formatting.signed_percent,
        points=formatting.points,
        ratio=formatting.ratio,
        size=formatting.size,
        bits=formatting.bit_rate,
        flops=formatting.flop_rate,
        metric=formatting.metric_name,
        script_json=script_json,
    )
    assets = {
        name: Markup(_asset(file))
        for name, file in (
            ("style", "style.css"),
            ("page_js", "page.js"),
            ("uplot_js", "uplot-1.6.32.min.js"),
            ("uplot_css", "uplot-1.6.32.min.css"),
        )
    }
    return environment.get_template(template).render(
        **assets, **context, relative=relative, use_steps=USE_STEPS, use_words=_use_words()
    )


def _asset(name: str) -> str:
    return (resources.files("helixbench.reports.render") / "templates" / name).read_text(encoding="utf-8")


def _use_words() -> tuple[str, ...]:
    """Legend of ``USE_STEPS``, from the least used to the bottleneck."""
    percents = [round(step * 100) for step in USE_STEPS[:-1]]
    return (
        f"below {percents[0]} %",
        *(f"{a} to {b} %" for a, b in zip(percents, [*percents[1:], 100], strict=True)),
        "bottleneck",
    )


def _merged(items: Sequence[T], most: int, row: Callable[[Sequence[T]], Row]) -> list[Row]:
    """One row for each group of consecutive items, at most ``most`` rows."""
    step = -(-len(items) // most) or 1
    return [row(items[i : i + step]) for i in range(0, len(items), step)]


def _timeline_rows(run: RunLog) -> list[Row]:
    """Total and output tokens/s over time."""

    def row(part: Sequence[tuple[float, Any]]) -> Row:
        start_s, end_s = part[0][0], part[-1][1].end_s
        counts = [count for _, count in part]
        return {
            "start_s": start_s,
            "end_s": end_s,
            "total": tokens_of(counts) / (end_s - start_s),
            "output": sum(count.output_tokens for count in counts) / (end_s - start_s),
            "in_window": run.window.start_s <= start_s and end_s <= run.window.end_s,
        }

    return _merged(timeline_intervals(run), MAX_TIMELINE_ROWS, row)


def _node_rows(run: RunLog) -> list[Row]:
    """Batch, KV use and busy share of each node over time."""
    rows: list[Row] = []
    for name, points in run.node_timeline.items():
        capacity = run.nodes[name].kv_capacity_tokens if name in run.nodes else 0
        starts_s = (0.0, *(point.end_s for point in points))

        def row(part: Sequence[tuple[float, Any]], name: str = name, capacity: int = capacity) -> Row:
            own = [point for _, point in part]
            batches = [point.batch_tokens for point in own if point.batch_tokens is not None]
            return {
                "node": name,
                "start_s": part[0][0],
                "end_s": own[-1].end_s,
                "batch_tokens": statistics.fmean(batches) if batches else None,
                "kv_tokens": own[-1].kv_tokens,
                "kv_use": own[-1].kv_tokens / capacity if capacity else None,
                "busy": statistics.fmean(point.busy for point in own),
            }

        rows += _merged(tuple(zip(starts_s, points, strict=False)), MAX_NODE_ROWS, row)
    return rows


def _throughput_in_words(run: RunLog) -> str:
    rates = [tokens_of([count]) / (count.end_s - start) for start, count in intervals_in_window(run)]
    if not rates:
        return "No complete interval lies inside the window."
    start, end = formatting.number(run.window.start_s), formatting.number(run.window.end_s)
    low, high, middle = (formatting.number(rate) for rate in (min(rates), max(rates), statistics.median(rates)))
    return f"In the window, from {start} s to {end} s, throughput was {low} to {high} tokens/s, median {middle}."
