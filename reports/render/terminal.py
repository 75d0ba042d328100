"""Summaries of a cluster profile, a plan and a run for the terminal: 80 columns, legible without colour, drawn once."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.text import Text

from helixbench.profiler.cluster import ClusterProfile, Node
from helixbench.reference_server.run_log import RunLog
from helixbench.reports.render import terminal_blocks as parts
from helixbench.reports.render.text import (
    TIMES,
    bit_rate,
    interval,
    link_name,
    number,
    percent,
    points,
    ratio,
    seconds,
    share_bar,
    signed_percent,
    size,
)
from helixbench.reports.verdict.causes import relative
from helixbench.reports.verdict.validate import validate
from helixbench.reports.verdict.verdict import Interval, Latency, LinkResidual, NodeResidual, Outcome, Verdict
from helixbench.solver.problem.plan import Expected, Plan

_STYLE: dict[Outcome, str] = {
    "as predicted": "bold green",
    "below expected": "bold red",
    "above expected": "bold yellow",
    "above bound": "bold red",
    "could not measure": "bold yellow",
}


def profile_summary(profile: ClusterProfile) -> RenderableType:
    """What each node and link of the cluster can do."""
    model, shared = profile.model, _shared_facts(profile)
    about = (
        f"{model.name}: {model.num_layers} layers of {size(model.layer_weight_bytes)}, "
        f"KV {size(model.kv_bytes_per_token_per_layer)} per token and layer"
    )
    return Group(
        Text.assemble(("CLUSTER", "bold"), "  ", about),
        parts.block("NODES", f"how many of the {model.num_layers} layers each can hold", _node_table(profile)),
        _cost_block(profile),
        _capacity_block(profile),
        parts.block("LINKS", "one way", _link_table(profile)),
        parts.facts("ALL NODES", [", ".join(fact for fact in _facts(profile.nodes[0]) if fact in shared)]),
        parts.facts("TESTBED", [profile.testbed]),
        _provenance(profile.provenance.created, profile.provenance.host, profile.provenance.command),
    )


def plan_summary(plan: Plan, profile: ClusterProfile | None = None) -> RenderableType:
    """Which node holds which layers, what flows where, and what is promised. The profile adds the devices."""
    predicted, solver = plan.predicted, plan.solver
    about = {node.name: node.device.name for node in profile.nodes} if profile else {}
    unused = sorted(about.keys() - plan.placement.keys())
    bars = [
        ("any plan", predicted.upper_bound_tokens_per_s, ("", "", "")),
        ("this plan", predicted.max_flow_tokens_per_s, ("", "", "")),
        *((f"expected at {e.concurrency}", e.total_tokens_per_s, _promises(e)) for e in predicted.expected),
    ]
    gap = f"any plan: upper bound, {percent(predicted.gap, 1)} above; this plan: bound, its max-flow"
    workload = plan.assumptions.workload
    return Group(
        Text.assemble(("PLAN", "bold"), f"  {plan.model}: {plan.num_layers} layers on {len(plan.placement)} nodes"),
        parts.placement(plan.placement, plan.num_layers, about),
        *([Text(f"  not used: {', '.join(unused)}")] if unused else []),
        parts.flows(plan),
        parts.block(
            "PROMISE",
            "total tokens/s; expected at that many requests in flight",
            parts.scale_bars(bars, "=interval", ">TTFT", ">TPOT"),
            Text(gap),
        ),
        parts.facts(
            "ASSUMES",
            [
                f"workload {workload.source}: {workload.mean_prompt_tokens:.4g} in, "
                f"{workload.mean_output_tokens:.4g} out on average",
                f"partial inference {'allowed' if plan.assumptions.partial_inference else 'not allowed'}, "
                f"objective {plan.assumptions.objective}",
                *plan.assumptions.notes,
            ],
        ),
        parts.facts("SOLVED BY", [f"{solver.method}, {solver.backend}: {solver.status} in {solver.seconds:.3g} s"]),
        _provenance(plan.provenance.created, plan.provenance.host, plan.provenance.command),
    )


def run_summary(run: RunLog, verdict: Verdict | None = None) -> RenderableType:
    """What was served beside what was promised, and the verdict. ``verdict`` where the band is not the usual one."""
    verdict = verdict or validate(run)
    plan = run.plan
    about = f"{plan.model}: {plan.num_layers} layers on {len(plan.placement)} nodes"
    mark = [Text("  simulated: no hardware ran, every number comes from the profile", style="bold yellow")]
    load = f"{run.concurrency} requests in flight, routing {run.routing}, window {run.window.seconds:.3g} s"
    return Group(
        Text.assemble(("SIMULATED RUN" if run.simulated else "RUN", "bold"), "  ", about),
        *(mark if run.simulated else []),
        Text(f"  {load}"),
        parts.placement(plan.placement, plan.num_layers, run.device_names),
        parts.flows(plan),
        _result_block(verdict),
        _latency_block(verdict.latencies),
        _node_residual_block(verdict.nodes),
        _link_residual_block(verdict.links),
        parts.facts("WHAT IS OFF", verdict.causes),
        _verdict_block(verdict),
        parts.facts("TESTBED", [run.testbed, *verdict.notes]),
        _provenance(run.provenance.created, run.provenance.host, run.provenance.command),
    )


def _verdict_block(verdict: Verdict) -> RenderableType:
    outcome = Text(verdict.outcome.upper(), style=_STYLE[verdict.outcome])
    return parts.block("VERDICT", outcome, Text(verdict.statement))


def _result_block(verdict: Verdict) -> RenderableType:
    verb = "simulated" if verdict.is_simulated else "measured"
    unknown = "" if verdict.expected_tokens_per_s is not None else "no prediction at this concurrency"
    rows = [
        ("bound", verdict.bound_tokens_per_s, (f"any plan: at most {number(verdict.upper_bound_tokens_per_s)}",)),
        ("expected", verdict.expected_tokens_per_s, (interval(verdict.expected_interval) or unknown,)),
        (verb, verdict.measured_tokens_per_s, (interval(verdict.measured_interval),)),
    ]
    against = f"{ratio(verdict.ratio_to_expected)} {TIMES} expected, {ratio(verdict.ratio_to_bound)} {TIMES} bound"
    return parts.block(
        "RESULT",
        "total tokens/s, with 95 % intervals",
        parts.scale_bars(rows, "", width=2 * parts.BAR),
        Text(f"{verb} is {against}", style="bold"),
    )


def _latency_block(latencies: tuple[Latency, ...]) -> RenderableType:
    rows = [
        (
            latency.kind.upper(),
            *(seconds(v) for v in (latency.p50_s, latency.p90_s, latency.p99_s, latency.mean_s)),
            seconds(latency.predicted_mean_s),
            signed_percent(relative(latency.mean_s, latency.predicted_mean_s)),
            str(latency.num_requests),
        )
        for latency in latencies
    ]
    grid = parts.table("", ">p50", ">p90", ">p99", ">mean", ">predicted", ">off", ">requests", rows=rows)
    return parts.block("LATENCY", "of the requests that finished in the window", grid)


def _node_residual_block(nodes: tuple[NodeResidual, ...]) -> RenderableType:
    rows = [
        (
            node.name,
            _pair(percent(node.planned_share), percent(node.realised_share)),
            _pair(percent(node.predicted_busy), percent(node.measured_busy)),
            _pair(number(node.predicted_batch_tokens), number(node.measured_batch_tokens)),
            _pair(seconds(node.predicted_iteration_s), seconds(node.measured_iteration_s)),
            signed_percent(relative(node.measured_iteration_s, node.predicted_iteration_s)),
        )
        for node in nodes
    ]
    grid = parts.table("", ">share", ">busy", ">batch", ">iteration", ">off", rows=rows)
    return parts.block("NODES", "planned / measured: share of tokens, time busy, decode batch, iteration", grid)


def _link_residual_block(links: tuple[LinkResidual, ...]) -> RenderableType:
    ranked = sorted(links, key=lambda link: -abs(link.realised_share - link.planned_share))
    rows = [
        (
            link_name(link.src, link.dst),
            percent(link.planned_share, 1),
            percent(link.realised_share, 1),
            points(link.realised_share - link.planned_share),
            bit_rate(link.measured_bytes_per_s),
        )
        for link in ranked[: parts.MAX_LINKS]
    ]
    grid = parts.table("", ">planned", ">measured", ">off", ">payload", rows=rows)
    return parts.block("LINKS", "share of the tokens, the furthest off first", grid)


def _pair(planned: str, measured: str) -> str:
    """``0.61 / 0.58``; the unit is said once where both have the same."""
    number_, _, unit = planned.rpartition(" ")
    if number_ and measured.endswith(f" {unit}"):
        planned = number_
    return f"{planned} / {measured}"


def _promises(expected: Expected) -> tuple[str, str, str]:
    low, high = expected.low_total_tokens_per_s, expected.high_total_tokens_per_s
    range_ = interval(Interval(low, high)) if low is not None and high is not None else ""
    ttft, tpot = ("" if value is None else seconds(value) for value in (expected.ttft_s, expected.tpot_s))
    return range_, ttft, tpot


def _node_table(profile: ClusterProfile) -> RenderableType:
    num_layers = profile.model.num_layers
    shared = _shared_facts(profile)
    rows = [
        (
            node.name,
            share_bar(node.max_layers / num_layers, 16),
            str(node.max_layers),
            size(node.device.memory_bytes),
            _device(node, shared),
        )
        for node in profile.nodes
    ]
    return parts.table("", "=", ">layers", ">memory", "device", rows=rows)


def _device(node: Node, shared: set[str]) -> str:
    own = (fact for fact in _facts(node) if fact not in shared)
    return ", ".join(filter(None, [node.device.name, *own, node.region]))


def _shared_facts(profile: ClusterProfile) -> set[str]:
    """What the driver or the OS says of every node alike: said once, so that what differs stands out."""
    return set.intersection(*(set(_facts(node)) for node in profile.nodes)) if len(profile.nodes) > 1 else set()


def _facts(node: Node) -> list[str]:
    return [
        f"{key} {f'{value:.4g}' if isinstance(value, float) else value}" for key, value in node.device.facts.items()
    ]


def _cost_block(profile: ClusterProfile) -> RenderableType:
    rows = [
        (
            node.name,
            seconds(node.cost.stage.step_s),
            seconds(node.cost.stage.layer_s),
            seconds(node.cost.stage.layer_token_s[-1]),
            seconds(node.cost.stage.head_s),
            percent(node.cost.held_out_error_median, 1),
            percent(node.cost.held_out_error_p90, 1),
        )
        for node in profile.nodes
        if node.cost is not None
    ]
    if not rows:
        return Text("", end="")
    grid = parts.table("", ">iteration", ">layer", ">layer token", ">head", ">error p50", ">p90", rows=rows)
    return parts.block("COST", "fitted stage time, and how far it misses samples kept out of the fit", grid)


def _capacity_block(profile: ClusterProfile) -> RenderableType:
    rows = [
        (node.name, number(node.capacity_tokens_per_s[0]), number(node.capacity_tokens_per_s[-1]))
        for node in profile.nodes
        if node.capacity_tokens_per_s
    ]
    if not rows:
        return Text("", end="")
    grid = parts.table("", ">1 layer", ">all that fit", rows=rows)
    return parts.block("CAPACITY", "tokens/s by layers held, from a table", grid)


def _link_table(profile: ClusterProfile) -> RenderableType:
    slowest_first = sorted(profile.links, key=lambda link: (link.bandwidth_bytes_per_s, link.src, link.dst))
    rows = [
        (link_name(link.src, link.dst), bit_rate(link.bandwidth_bytes_per_s), seconds(link.latency_s), link.source)
        for link in slowest_first[: parts.MAX_ROWS]
    ]
    more = len(slowest_first) - len(rows)
    if more > 0:
        rows.append((f"{more} more", f"up to {bit_rate(slowest_first[-1].bandwidth_bytes_per_s)}", "", ""))
    default = profile.default_link
    if default is not None:
        rows.append(("every other pair", bit_rate(default.bandwidth_bytes_per_s), seconds(default.latency_s), ""))
    return parts.table("", ">bandwidth", ">latency", "source", rows=rows)


def _provenance(created: str, host: str, command: str) -> RenderableType:
    where = " on ".join(filter(None, [created, host]))
    return parts.facts("MADE", [where, command])
