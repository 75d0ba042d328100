"""Summaries of a cluster profile, a plan and a run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from helixbench.profiler.cluster import STAGE_TIMES_FACT, ClusterProfile, Node
from helixbench.profiler.emulated_device import DIGEST_FACT
from helixbench.reference_server.run_log import RunLog
from helixbench.reports.formatting import (
    TIMES,
    bit_rate,
    interval,
    layer_bar,
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
from helixbench.reports.loading import Record
from helixbench.reports.render.adaptation import adaptation_sections
from helixbench.reports.render.document import BAD, BOLD, CAUTION, GOOD, Document, Row, Section, Styled, section
from helixbench.reports.render.layers import layer_sections
from helixbench.reports.verdict.causes import relative
from helixbench.reports.verdict.client import ClientResult
from helixbench.reports.verdict.validate import PREDICTED_ARRIVALS, validate
from helixbench.reports.verdict.verdict import Interval, Latency, LinkResidual, NodeResidual, Outcome, Verdict
from helixbench.solver.problem.plan import Expected, LayerRange, Plan

BAR, LAYER_BAR = 14, 32
# Longer lists are cut after the most important rows, and the others counted.
MAX_NODES, MAX_LINKS = 24, 12
# Flow over capacity from which a node or link counts as the bottleneck.
SATURATED = 0.999
OUTCOME_STYLE = {
    Outcome.AS_PREDICTED: GOOD,
    Outcome.BELOW_EXPECTED: BAD,
    Outcome.ABOVE_EXPECTED: CAUTION,
    Outcome.ABOVE_BOUND: BAD,
    Outcome.NOT_MEASURED: CAUTION,
    Outcome.UNSOUND: CAUTION,
}
NODE_COLUMNS = ("node", ">share", ">busy", ">batch", ">iteration", ">off")
NODE_ABOUT = "predicted / measured: share of tokens, time busy, decode batch, iteration"
LINK_COLUMNS = ("link", ">planned", ">measured", ">off", ">payload")


def summary(record: Record) -> Document:
    """The summary of any record."""
    if isinstance(record, RunLog):
        return run_summary(record)
    return plan_summary(record) if isinstance(record, Plan) else profile_summary(record)


def run_summary(run: RunLog, verdict: Verdict | None = None) -> Document:
    """Measured beside predicted performance; ``verdict`` if it is not that of the default band."""
    verdict, plan = verdict or validate(run), run.plan
    in_flight = f"{run.concurrency} requests in flight"
    if run.arrivals not in PREDICTED_ARRIVALS:
        in_flight = f"arrivals: {run.arrivals}; up to {in_flight}"
    load = f"{in_flight}, routing {run.routing}, window {run.window.seconds:.3g} s"
    return Document(
        kind="simulated run" if run.simulated else "emulated run" if run.emulated else "run",
        title=f"{plan.model}: {plan.num_layers} layers on {len(plan.placement)} nodes",
        lines=(
            *(["simulated: no hardware ran, all times come from the profile"] if run.simulated else []),
            *_emulation(run),
            load,
            *_goodput(verdict),
        ),
        sections=(
            _placement(plan, run.device_names),
            *_flows(plan),
            _result(verdict),
            *adaptation_sections(run.adaptation),
            section(
                "Latency",
                "requests that finished in the window",
                ("", ">p50", ">p90", ">p99", ">mean", ">predicted", ">off", ">requests"),
                (row for latency in verdict.latencies for row in _latency_rows(latency)),
            ),
            *_client(verdict),
            section("Nodes", NODE_ABOUT, NODE_COLUMNS, map(node_row, worst_nodes(verdict.nodes)), most=MAX_NODES),
            section(
                "Links", "share of the tokens", LINK_COLUMNS, map(link_row, worst_links(verdict.links)), most=MAX_LINKS
            ),
            Section(title="Likely causes", lines=verdict.causes, is_detail=False),
        ),
        verdict=Styled(verdict.outcome, OUTCOME_STYLE[verdict.outcome]),
        statement=verdict.statement,
        notes=(*(f"stale profile: {line}" for line in verdict.stale), run.testbed, *verdict.notes),
        provenance=run.provenance,
    )


def _emulation(run: RunLog) -> list[str]:
    """What was emulated, and how well the nodes kept to it."""
    if not run.emulated:
        return []
    uses = [run.nodes[name] for name in run.emulated if name in run.nodes]
    iterations, late = sum(use.iterations for use in uses), sum(use.late_iterations for use in uses)
    error_s = sum(use.release_error_s for use in uses) / max(1, iterations - late)
    scale = f" at time scale {run.time_scale:g}; all times are the devices'" if run.time_scale != 1 else ""
    return [
        f"emulated: {len(run.emulated)} of {len(run.plan.placement)} nodes keep the times of other devices{scale}",
        f"{late} of {iterations} emulated iterations late ({percent(run.late_share, 1)}), "
        f"the others released {seconds(error_s)} after they were due on average",
    ]


def plan_summary(plan: Plan, profile: ClusterProfile | None = None) -> Document:
    """Placement, flow and predictions. The profile adds the devices and the unused nodes."""
    predicted, solver, workload = plan.predicted, plan.solver, plan.assumptions.workload
    devices = {name: flow.device for name, flow in plan.nodes.items() if flow.device}
    devices |= {node.name: node.device.label for node in profile.nodes} if profile else {}
    unused = sorted(devices.keys() - plan.placement.keys())
    rates = [
        ("any plan", predicted.upper_bound_tokens_per_s, ("", "", "")),
        ("this plan", predicted.max_flow_tokens_per_s, ("", "", "")),
        *((f"expected at {e.concurrency}", e.total_tokens_per_s, _expected_cells(e)) for e in predicted.expected),
    ]
    return Document(
        kind="plan",
        title=f"{plan.model}: {plan.num_layers} layers on {len(plan.placement)} nodes",
        sections=(
            _placement(plan, devices, lines=[f"not used: {', '.join(unused)}"] if unused else []),
            *_flows(plan),
            section(
                "Prediction",
                "total tokens/s: upper bounds, and expected by requests in flight",
                ("", "=", ">", ">interval", ">TTFT", ">TPOT"),
                _scaled(rates),
                lines=[f"the bound of any plan is {percent(predicted.gap, 1)} above that of this plan, its max-flow"],
                is_detail=False,
            ),
            Section(
                title="Assumptions",
                lines=(
                    f"workload {workload.source}: {workload.mean_prompt_tokens:.4g} input and "
                    f"{workload.mean_output_tokens:.4g} output tokens on average",
                    f"partial inference {'allowed' if plan.assumptions.partial_inference else 'not allowed'}, "
                    f"objective {plan.assumptions.objective}",
                    *plan.assumptions.notes,
                ),
            ),
            Section(
                title="Solver",
                lines=(f"{solver.method}, {solver.backend}: {solver.status} in {solver.seconds:.3g} s",),
            ),
        ),
        provenance=plan.provenance,
    )


def profile_summary(profile: ClusterProfile) -> Document:
    """Memory, stage times and links of a cluster."""
    model, shared = profile.model, _shared_facts(profile)
    return Document(
        kind="cluster",
        title=f"{model.name}: {model.num_layers} layers of {size(model.layer_weight_bytes)}, "
        f"KV {size(model.kv_bytes_per_token_per_layer)} per token and layer",
        sections=(
            section(
                "Nodes",
                f"layers that fit, of {model.num_layers}",
                ("node", "=", ">layers", ">memory", "device"),
                (_profile_row(node, model.num_layers, shared) for node in profile.nodes),
                is_detail=False,
            ),
            section(
                "Cost",
                "fitted stage time; error on held-out samples",
                ("node", ">iteration", ">layer", ">layer token", ">head", ">error p50", ">p90"),
                _cost_rows(profile),
            ),
            *layer_sections(profile),
            section(
                "Capacity",
                "tokens/s from a table",
                ("node", ">1 layer", ">all layers that fit"),
                (
                    (node.name, number(node.capacity_tokens_per_s[0]), number(node.capacity_tokens_per_s[-1]))
                    for node in profile.nodes
                    if node.capacity_tokens_per_s
                ),
            ),
            _profile_links(profile),
        ),
        notes=(", ".join(fact for fact in _facts(profile.nodes[0]) if fact in shared), profile.testbed),
        provenance=profile.provenance,
    )


def node_row(node: NodeResidual) -> Row:
    """Predicted and measured values of a node, under ``NODE_COLUMNS``."""
    return (
        node.name,
        _pair(percent(node.planned_share), percent(node.realised_share)),
        _pair(percent(node.predicted_busy), percent(node.measured_busy)),
        _pair(number(node.predicted_batch_tokens), number(node.measured_batch_tokens)),
        _pair(seconds(node.predicted_iteration_s), seconds(node.measured_iteration_s)),
        signed_percent(relative(node.measured_iteration_s, node.predicted_iteration_s)),
    )


def link_row(link: LinkResidual) -> Row:
    """Shares of a link, under ``LINK_COLUMNS``."""
    return (
        link_name(link.src, link.dst),
        percent(link.planned_share, 1),
        percent(link.realised_share, 1),
        points(link.realised_share - link.planned_share),
        bit_rate(link.measured_bytes_per_s),
    )


def worst_nodes(nodes: Iterable[NodeResidual]) -> list[NodeResidual]:
    """By the largest relative error of iteration time or share."""

    def error(node: NodeResidual) -> float:
        iteration = relative(node.measured_iteration_s, node.predicted_iteration_s)
        share = relative(node.realised_share, node.planned_share)
        return max(abs(iteration or 0.0), abs(share or 0.0))

    return sorted(nodes, key=error, reverse=True)


def worst_links(links: Iterable[LinkResidual]) -> list[LinkResidual]:
    """By the difference of planned and realised share."""
    return sorted(links, key=lambda link: -abs(link.realised_share - link.planned_share))


def _placement(plan: Plan, devices: Mapping[str, str], *, lines: Iterable[str] = ()) -> Section:
    total = plan.num_layers
    width = LAYER_BAR if total > LAYER_BAR else total * max(1, LAYER_BAR // total)
    ordered: list[tuple[str, LayerRange]] = sorted(plan.placement.items(), key=lambda item: (item[1], item[0]))
    rows = ((name, layer_bar(held, total, width), str(held), devices.get(name, "")) for name, held in ordered)
    return section("Placement", f"of layers [0,{total})", ("node", "=", ">layers", "device"), rows, lines=lines)


def _flows(plan: Plan) -> tuple[Section, Section]:
    """Flow against capacity of nodes and links, the most used first."""
    nodes = [(name, flow.flow_tokens_per_s, flow.capacity_tokens_per_s) for name, flow in plan.nodes.items()]
    links = [(link_name(flow.src, flow.dst), flow.flow_tokens_per_s, flow.capacity_tokens_per_s) for flow in plan.flows]
    cut = "; ".join(plan.predicted.bottleneck)
    columns = ("", "=", ">flow", ">capacity", ">use", "")
    about = "flow and capacity, tokens/s"
    return (
        section("Node flows", about, columns, _flow_rows(nodes), most=MAX_NODES),
        section(
            "Link flows",
            about,
            columns,
            _flow_rows(links),
            most=MAX_LINKS,
            lines=[f"bottleneck (min cut): {cut}"] if cut else [],
        ),
    )


def _flow_rows(entries: Sequence[tuple[str, float, float]]) -> Iterator[Row]:
    for name, flow, capacity in sorted(entries, key=lambda entry: (-use_of(entry[1], entry[2]), entry[0])):
        use = use_of(flow, capacity)
        is_bottleneck = use >= SATURATED
        use_text = "<1 %" if 0 < use < 0.01 else percent(use)
        cells = (name, share_bar(use, BAR), number(flow), number(capacity), use_text)
        yield (*(Styled(cell, BOLD) for cell in cells), Styled("bottleneck", BOLD)) if is_bottleneck else (*cells, "")


def use_of(flow: float, capacity: float) -> float:
    """Flow over capacity; infinite for a flow without capacity."""
    if capacity > 0:
        return flow / capacity
    return float("inf") if flow > 0 else 0.0


def _result(verdict: Verdict) -> Section:
    verb = "simulated" if verdict.is_simulated else "measured"
    unknown = "" if verdict.expected_tokens_per_s is not None else "no prediction for this load"
    rows = [
        ("bound", verdict.bound_tokens_per_s, (f"any plan: at most {number(verdict.upper_bound_tokens_per_s)}",)),
        ("expected", verdict.expected_tokens_per_s, (interval(verdict.expected_interval) or unknown,)),
        (verb, verdict.measured_tokens_per_s, (interval(verdict.measured_interval),)),
    ]
    against = f"{ratio(verdict.ratio_to_expected)} {TIMES} expected, {ratio(verdict.ratio_to_bound)} {TIMES} bound"
    return section(
        "Result",
        "total tokens/s, with 95 % intervals",
        ("", "=", ">", "interval"),
        _scaled(rows, width=2 * BAR),
        lines=[f"{verb} is {against}"],
        is_detail=False,
    )


def _scaled(rows: Sequence[tuple[str, float | None, tuple[str, ...]]], *, width: int = BAR) -> Iterator[Row]:
    """Rows ``(name, value, remarks)`` with bars on one scale."""
    top = max((value for _, value, _ in rows if value is not None), default=0.0)
    for name, value, remarks in rows:
        yield (name, share_bar(value / top if value is not None and top else 0.0, width), number(value), *remarks)


def _goodput(verdict: Verdict) -> list[str]:
    if verdict.goodput_per_s is None:
        return []
    promised = verdict.promised_goodput_per_s
    beside = "" if promised is None else f", promised {number(promised)}"
    return [f"goodput {number(verdict.goodput_per_s)} requests/s{beside}, within {verdict.goodput_limits}"]


def _client(verdict: Verdict) -> Iterator[Section]:
    if (client := verdict.client) is not None:
        yield section(
            "Another client",
            f"{client.result.num_requests} requests in {client.result.duration_s:.4g} s",
            ("", ">this run", f">{client.result.client}", ">off", ">expected"),
            client_rows(verdict, client.result),
            lines=(client.statement,),
            is_detail=False,
        )


def client_rows(verdict: Verdict, theirs: ClientResult) -> list[Row]:
    """Another client's figures beside the run's: name, run, client, difference, expected."""
    ours: dict[str, Latency] = {latency.kind: latency for latency in verdict.latencies}
    rows: list[Row] = [
        _client_row("tokens/s", number, verdict.measured_tokens_per_s, theirs.total_tokens_per_s, verdict),
        _client_row("output tokens/s", number, verdict.measured_output_tokens_per_s, theirs.output_tokens_per_s),
    ]
    for kind, stated in (("ttft", theirs.ttft), ("tpot", theirs.tpot)):
        own = ours.get(kind)
        rows += [
            _client_row(
                f"{kind.upper()} {name}", seconds, getattr(own, f"{name}_s", None), getattr(stated, f"{name}_s")
            )
            for name in ("mean", "p50", "p90", "p99")
        ]
    return rows


def _client_row(
    name: str,
    shown: Callable[[float | None], str],
    own: float | None,
    theirs: float | None,
    verdict: Verdict | None = None,
) -> Row:
    expected = "" if verdict is None else shown(verdict.expected_tokens_per_s)
    return name, shown(own), shown(theirs), signed_percent(relative(theirs, own)), expected


def _latency_rows(latency: Latency) -> Iterator[Row]:
    yield (
        latency.kind.upper(),
        *(seconds(value) for value in (latency.p50_s, latency.p90_s, latency.p99_s, latency.mean_s)),
        seconds(latency.predicted_mean_s),
        signed_percent(relative(latency.mean_s, latency.predicted_mean_s)),
        str(latency.num_requests),
    )
    if latency.promised is not None:
        promised = latency.promised
        yield "  promised", *(seconds(value) for value in (promised.p50_s, promised.p90_s, promised.p99_s)), *[""] * 4


def _pair(predicted: str, measured: str) -> str:
    """``0.61 / 0.58``; a unit that both share is written once."""
    value, _, unit = predicted.rpartition(" ")
    if value and measured.endswith(f" {unit}"):
        predicted = value
    return f"{predicted} / {measured}"


def _expected_cells(expected: Expected) -> tuple[str, str, str]:
    low, high = expected.low_total_tokens_per_s, expected.high_total_tokens_per_s
    span = interval(Interval(low, high)) if low is not None and high is not None else ""
    ttft, tpot = ("" if value is None else seconds(value) for value in (expected.ttft_s, expected.tpot_s))
    return span, ttft, tpot


def _profile_row(node: Node, num_layers: int, shared: set[str]) -> Row:
    own = (fact for fact in _facts(node) if fact not in shared)
    about = ", ".join(filter(None, [node.device.label, *own, node.region]))
    bar = share_bar(node.max_layers / num_layers, BAR)
    return node.name, bar, str(node.max_layers), size(node.device.memory_bytes), about


def _shared_facts(profile: ClusterProfile) -> set[str]:
    """Facts that all nodes have in common: listed once, so that differences stand out."""
    return set.intersection(*(set(_facts(node)) for node in profile.nodes)) if len(profile.nodes) > 1 else set()


def _facts(node: Node) -> list[str]:
    return [
        f"{key} {f'{value:.4g}' if isinstance(value, float) else value}"
        for key, value in node.device.facts.items()
        if key not in (DIGEST_FACT, STAGE_TIMES_FACT)  # the one says nothing to people, the other is in the label
    ]


def _cost_rows(profile: ClusterProfile) -> Iterator[Row]:
    for node in profile.nodes:
        if node.cost is not None:
            stage = node.cost.stage
            yield (
                node.name,
                *map(seconds, (stage.step_s, stage.layer_s, stage.layer_token_s[-1], stage.head_s)),
                percent(node.cost.held_out_error_median, 1),
                percent(node.cost.held_out_error_p90, 1),
            )


def _profile_links(profile: ClusterProfile) -> Section:
    slowest_first = sorted(profile.links, key=lambda link: (link.bandwidth_bytes_per_s, link.src, link.dst))
    rows = (
        (link_name(link.src, link.dst), bit_rate(link.bandwidth_bytes_per_s), seconds(link.latency_s), link.source)
        for link in slowest_first
    )
    default = profile.default_link
    every_other = (
        [f"every other pair: {bit_rate(default.bandwidth_bytes_per_s)}, {seconds(default.latency_s)}"]
        if default is not None
        else []
    )
    columns = ("link", ">bandwidth", ">latency", "source")
    return section("Links", "one way, the slowest first", columns, rows, most=MAX_NODES, lines=every_other)
