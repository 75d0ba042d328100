"""A record as one self-contained page: opens without a network, prints, reads on a phone, light and dark.

The flow picture, the bars and the tables are made here, by templates: they are geometry that no chart library knows,
and they read without JavaScript. The charts over time and of latency are drawn by uPlot from the record that the page
embeds: 51 kB that bring axes, a cursor and a legend; Vega or Plotly would add 0.8 to 4.5 MB to every report.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from importlib import resources

import msgspec
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from helixbench.profiler.cluster import ClusterProfile
from helixbench.reference_server.run_log import RunLog
from helixbench.reports.render import text as figures
from helixbench.reports.render.flow_picture import USE_STEPS, flow_picture
from helixbench.reports.verdict.causes import relative
from helixbench.reports.verdict.integrity import intervals_in_window, timeline_intervals, tokens_of
from helixbench.reports.verdict.validate import validate
from helixbench.solver.problem.plan import Plan

# The table under a chart says what the chart shows; intervals are put together to keep it short.
MAX_TIMELINE_ROWS = 48
MAX_NODE_ROWS = 24


def html_page(record: ClusterProfile | Plan | RunLog) -> str:
    """The page of a run, a plan or a cluster profile."""
    if isinstance(record, RunLog):
        return run_page(record)
    return plan_page(record) if isinstance(record, Plan) else profile_page(record)


def run_page(run: RunLog) -> str:
    """Measured against predicted."""
    verdict = validate(run)
    return render(
        "run.html.j2",
        title=f"{run.plan.model}: {verdict.outcome}",
        run=run,
        plan=run.plan,
        verdict=verdict,
        picture=flow_picture(run.plan, about=run.device_names, regions=run.regions),
        devices=run.device_names,
        timeline=_timeline_rows(run),
        node_timeline=_node_rows(run),
        throughput=_throughput_in_words(run),
        provenance=run.provenance,
        records={"record": run, "verdict": verdict},
    )


def plan_page(plan: Plan) -> str:
    """Placement, flows and promises."""
    return render(
        "plan.html.j2",
        title=f"{plan.model}: plan",
        plan=plan,
        picture=flow_picture(plan, about=devices_of(plan), regions=regions_of(plan)),
        devices=devices_of(plan),
        provenance=plan.provenance,
        records={"record": plan},
    )


def profile_page(profile: ClusterProfile) -> str:
    """Nodes and links as measured."""
    return render(
        "profile.html.j2",
        title=f"{profile.model.name}: cluster",
        profile=profile,
        provenance=profile.provenance,
        records={"record": profile},
    )


def devices_of(plan: Plan) -> dict[str, str]:
    """Node -> device, where the plan says it."""
    return {name: use.device for name, use in plan.nodes.items() if use.device}


def regions_of(plan: Plan) -> dict[str, str]:
    """Node -> region, where the plan says it."""
    return {name: use.region for name, use in plan.nodes.items() if use.region}


def script_json(record: msgspec.Struct) -> Markup:
    """JSON that can stand inside a script element: no ``</script>`` and no comment can occur in it."""
    text = msgspec.json.encode(record).decode()
    for char in "<>&\u2028\u2029":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return Markup(text)


def render(template: str, **context: object) -> str:
    """The page of that template, with all that it needs inside."""
    environment = Environment(
        loader=PackageLoader("helixbench.reports.render", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        number=figures.number,
        interval=figures.interval,
        seconds=figures.seconds,
        percent=figures.percent,
        signed=figures.signed_percent,
        points=figures.points,
        ratio=figures.ratio,
        size=figures.size,
        bits=figures.bit_rate,
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
    """What each step of use is called, from the least to the bottleneck."""
    percents = [round(step * 100) for step in USE_STEPS[:-1]]
    return (
        f"below {percents[0]} %",
        *(f"{a} to {b} %" for a, b in zip(percents, [*percents[1:], 100], strict=True)),
        "bottleneck",
    )


def _timeline_rows(run: RunLog) -> list[Mapping[str, float | bool]]:
    """Total and output tokens/s over time, at most ``MAX_TIMELINE_ROWS`` rows."""
    spans = timeline_intervals(run)
    step = -(-len(spans) // MAX_TIMELINE_ROWS) or 1
    rows: list[Mapping[str, float | bool]] = []
    for i in range(0, len(spans), step):
        part = spans[i : i + step]
        start, end = part[0][0], part[-1][1].end_s
        counts = [count for _, count in part]
        rows.append(
            {
                "start_s": start,
                "end_s": end,
                "total": tokens_of(counts) / (end - start),
                "output": sum(count.output_tokens for count in counts) / (end - start),
                "in_window": run.window.start_s <= start and end <= run.window.end_s,
            }
        )
    return rows


def _node_rows(run: RunLog) -> list[Mapping[str, str | float | None]]:
    """Each node's series in at most ``MAX_NODE_ROWS`` rows."""
    rows: list[Mapping[str, str | float | None]] = []
    for name, points in run.node_timeline.items():
        step = -(-len(points) // MAX_NODE_ROWS) or 1
        capacity = run.nodes[name].kv_capacity_tokens if name in run.nodes else 0
        start_s = 0.0
        for i in range(0, len(points), step):
            part = points[i : i + step]
            batches = [point.batch_tokens for point in part if point.batch_tokens is not None]
            last = part[-1]
            rows.append(
                {
                    "node": name,
                    "start_s": start_s,
                    "end_s": last.end_s,
                    "batch_tokens": statistics.fmean(batches) if batches else None,
                    "kv_tokens": last.kv_tokens,
                    "kv_use": last.kv_tokens / capacity if capacity else None,
                    "busy": statistics.fmean(point.busy for point in part),
                }
            )
            start_s = last.end_s
    return rows


def _throughput_in_words(run: RunLog) -> str:
    rates = [tokens_of([count]) / (count.end_s - start) for start, count in intervals_in_window(run)]
    if not rates:
        return "No whole interval lies inside the window."
    start, end = figures.number(run.window.start_s), figures.number(run.window.end_s)
    low, high, middle = (figures.number(rate) for rate in (min(rates), max(rates), statistics.median(rates)))
    return (
        f"Inside the window, from {start} s to {end} s, an interval carried {low} to {high} tokens/s, {middle} midway."
    )
