"""A record as a short Markdown comment: the verdict first, the worst residuals next, the rest folded away."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from helixbench.profiler.cluster import ClusterProfile
from helixbench.reference_server.run_log import RunLog
from helixbench.reports.compare.compare import Comparison
from helixbench.reports.compare.terminal import changes_in_order
from helixbench.reports.gate.cases import Case, worst_first
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
    signed_percent,
    size,
)
from helixbench.reports.verdict.causes import relative
from helixbench.reports.verdict.validate import validate
from helixbench.reports.verdict.verdict import NodeResidual, Verdict
from helixbench.solver.problem.plan import Plan

# GitHub cuts a comment at 65 536 characters and a step summary at 1 MiB; rows are left out long before.
MAX_ROWS = 40
MAX_CHARACTERS = 60_000


def markdown_comment(record: ClusterProfile | Plan | RunLog) -> str:
    """The comment, at most ``MAX_CHARACTERS`` long."""
    if isinstance(record, RunLog):
        parts = run_markdown(record, validate(record))
    else:
        parts = plan_markdown(record) if isinstance(record, Plan) else profile_markdown(record)
    return fit(parts)


def run_markdown(run: RunLog, verdict: Verdict) -> list[str]:
    """The parts of a run's comment, the most important first."""
    nodes = sorted(verdict.nodes, key=_worst, reverse=True)
    links = sorted(verdict.links, key=lambda link: -abs(link.realised_share - link.planned_share))
    return [
        f"### helixbench: {verdict.outcome}" + (" (simulated)" if verdict.is_simulated else ""),
        "**No hardware ran: every number is simulated from the profile.**" if verdict.is_simulated else "",
        escape(verdict.statement),
        table(
            ("total tokens/s", ">value", "95 % interval", f">measured {TIMES}"),
            [
                ("bound", number(verdict.bound_tokens_per_s), "", ratio(verdict.ratio_to_bound)),
                (
                    "expected",
                    number(verdict.expected_tokens_per_s),
                    interval(verdict.expected_interval),
                    ratio(verdict.ratio_to_expected),
                ),
                (
                    f"**{'simulated' if verdict.is_simulated else 'measured'}**",
                    number(verdict.measured_tokens_per_s),
                    interval(verdict.measured_interval),
                    "",
                ),
            ],
        ),
        bullets(verdict.causes),
        bullets([text for text in dict.fromkeys([run.testbed, *verdict.notes]) if text]),
        folded(
            "Nodes, planned / measured, worst first",
            table(
                ("node", "layers", ">share", ">busy", ">batch", ">iteration", ">off"),
                [_node_row(node) for node in nodes[:MAX_ROWS]],
            ),
        ),
        folded(
            "Links, share of the tokens, worst first",
            table(
                ("link", ">planned", ">measured", ">off", ">payload"),
                [
                    (
                        link_name(link.src, link.dst),
                        percent(link.planned_share, 1),
                        percent(link.realised_share, 1),
                        points(link.realised_share - link.planned_share),
                        bit_rate(link.measured_bytes_per_s),
                    )
                    for link in links[:MAX_ROWS]
                ],
            ),
        ),
        folded(
            "Latency",
            table(
                ("", ">p50", ">p90", ">p99", ">mean", ">predicted mean"),
                [
                    (
                        latency.kind.upper(),
                        *(seconds(v) for v in (latency.p50_s, latency.p90_s, latency.p99_s, latency.mean_s)),
                        seconds(latency.predicted_mean_s),
                    )
                    for latency in verdict.latencies
                ],
            ),
        ),
        f"<sub>{escape(run.provenance.command)} · {escape(run.provenance.created)}</sub>"
        if run.provenance.command
        else "",
    ]


def plan_markdown(plan: Plan) -> list[str]:
    """The parts of a plan's comment."""
    nodes = sorted(plan.nodes, key=lambda name: (plan.placement[name], name))
    predicted = plan.predicted
    return [
        f"### helixbench: plan of {escape(plan.model)} on {len(plan.placement)} nodes",
        f"Bound {number(predicted.max_flow_tokens_per_s)} tokens/s; no plan can exceed "
        f"{number(predicted.upper_bound_tokens_per_s)} ({percent(predicted.gap, 1)} above).",
        bullets(f"bottleneck: {cut}" for cut in predicted.bottleneck),
        table(
            (">in flight", ">expected total tokens/s", ">TTFT", ">TPOT"),
            [
                (str(e.concurrency), number(e.total_tokens_per_s), seconds(e.ttft_s), seconds(e.tpot_s))
                for e in predicted.expected
            ],
        ),
        folded(
            "Placement and flow",
            table(
                ("node", "layers", ">flow", ">capacity"),
                [
                    (
                        name,
                        str(plan.placement[name]),
                        number(plan.nodes[name].flow_tokens_per_s),
                        number(plan.nodes[name].capacity_tokens_per_s),
                    )
                    for name in nodes[:MAX_ROWS]
                ],
            ),
        ),
        bullets(plan.assumptions.notes),
    ]


def profile_markdown(profile: ClusterProfile) -> list[str]:
    """The parts of a cluster's comment."""
    return [
        f"### helixbench: {len(profile.nodes)} nodes profiled for {escape(profile.model.name)}",
        table(
            ("node", "device", ">memory", ">layers", ">held-out error p50"),
            [
                (
                    node.name,
                    node.device.name,
                    size(node.device.memory_bytes),
                    str(node.max_layers),
                    percent(node.cost.held_out_error_median, 1) if node.cost else "table",
                )
                for node in profile.nodes[:MAX_ROWS]
            ],
        ),
        escape(profile.testbed),
    ]


def comparison_markdown(comparison: Comparison) -> list[str]:
    """The parts of a comparison's comment, the worst change first."""
    rows = [
        (
            change.judgement,
            change.name,
            change.base,
            change.new,
            ratio(change.ratio) if change.ratio is not None else "",
            interval(change.interval) if change.interval and change.interval.low != change.interval.high else "",
        )
        for change in changes_in_order(comparison)
    ]
    left_out = len(rows) - MAX_ROWS
    return [
        f"### helixbench: two {comparison.kind}s compared",
        table(("", "what", ">base", ">new", ">new / base", "95 % interval"), rows[:MAX_ROWS]) or "Nothing changed.",
        f"{left_out} more changes are left out." if left_out > 0 else "",
        bullets(comparison.notes),
    ]


def gate_markdown(cases: Sequence[Case]) -> list[str]:
    """The parts of a gate's comment, the worst case first."""
    ordered = worst_first(tuple(cases))
    bad = [case for case in ordered if case.status != "passed"]
    title = f"{len(bad)} of {len(ordered)} not passed" if bad else f"passed ({len(ordered)} checks)"
    return [
        f"### helixbench gate: {title}",
        table(("", "gate", "message"), [(case.status, f"{case.suite}: {case.name}", case.message) for case in bad]),
        folded(
            "Passed",
            table(("gate", "message"), [(f"{c.suite}: {c.name}", c.message) for c in ordered if c.status == "passed"]),
        ),
    ]


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; a column that starts with ``>`` is right-aligned. Empty without rows."""
    body = ["| " + " | ".join(escape(cell) for cell in row) + " |" for row in rows]
    if not body:
        return ""
    head = "| " + " | ".join(column.removeprefix(">") for column in columns) + " |"
    rule = "|" + "|".join("---:" if column.startswith(">") else "---" for column in columns) + "|"
    return "\n".join([head, rule, *body])


def bullets(lines: Iterable[str]) -> str:
    """One bullet a line."""
    return "\n".join(f"- {escape(line)}" for line in lines)


def folded(title: str, body: str) -> str:
    """A part that opens on a click; nothing where there is no body."""
    return f"<details><summary>{title}</summary>\n\n{body}\n\n</details>" if body else ""


def escape(text: str) -> str:
    """Text from a record, so that it can neither break a table nor become markup."""
    for char in ("\\", "|", "<", "[", "`", "@"):
        text = text.replace(char, {"<": "&lt;", "@": "@\u200b"}.get(char, "\\" + char))
    return " ".join(text.split())


def fit(parts: Iterable[str], *, max_characters: int = MAX_CHARACTERS) -> str:
    """The parts in order, as many as fit; a last line says that some were left out."""
    kept: list[str] = []
    length = 0
    for part in filter(None, parts):
        length += len(part) + 2
        if length > max_characters:
            kept.append("_Cut here: the rest does not fit into a comment._")
            break
        kept.append(part)
    return "\n\n".join(kept) + "\n"


def _node_row(node: NodeResidual) -> tuple[str, ...]:
    return (
        node.name,
        str(node.layers or ""),
        f"{percent(node.planned_share)} / {percent(node.realised_share)}",
        f"{percent(node.predicted_busy)} / {percent(node.measured_busy)}",
        f"{number(node.predicted_batch_tokens)} / {number(node.measured_batch_tokens)}",
        f"{seconds(node.predicted_iteration_s)} / {seconds(node.measured_iteration_s)}",
        signed_percent(relative(node.measured_iteration_s, node.predicted_iteration_s)),
    )


def _worst(node: NodeResidual) -> float:
    offs = (
        relative(node.measured_iteration_s, node.predicted_iteration_s),
        relative(node.realised_share, node.planned_share),
    )
    return max((abs(off) for off in offs if off is not None), default=0.0)
