"""Consistency checks of a run record: its counts, times and pipelines against each other. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from helixbench.profiler.cluster import COORDINATOR
from helixbench.records import digest
from helixbench.reference_server.run_log import RunLog, TokenCount
from helixbench.reports.verdict.verdict import Check

# Busy time and window come from different clocks.
BUSY_SLACK = 1.02
# A node reports its busy time between two iterations, so either end of the window is off by up to one iteration.
BUSY_SLACK_ITERATIONS = 2
TIME_SLACK_S = 1e-6


def check_run(run: RunLog) -> tuple[Check, ...]:
    """The results of ``CHECKS``, in their order."""
    faults = {name: find_fault(run) for name, find_fault in CHECKS.items()}
    return tuple(Check(name=name, is_passed=fault is None, message=fault or "ok") for name, fault in faults.items())


def intervals_in_window(run: RunLog) -> tuple[tuple[float, TokenCount], ...]:
    """Timeline intervals that lie entirely inside the window, each with its start in seconds."""
    return tuple(
        (start, count)
        for start, count in timeline_intervals(run)
        if start >= run.window.start_s - TIME_SLACK_S and count.end_s <= run.window.end_s + TIME_SLACK_S
    )


def timeline_intervals(run: RunLog) -> tuple[tuple[float, TokenCount], ...]:
    """Timeline intervals with their starts: the end of the previous one, 0 for the first."""
    starts = (0.0, *(count.end_s for count in run.timeline))
    return tuple(zip(starts, run.timeline, strict=False))


def tokens_of(counts: Iterable[TokenCount]) -> int:
    """Prompt plus output tokens."""
    return sum(count.prompt_tokens + count.output_tokens for count in counts)


def _window_inside_run(run: RunLog) -> str | None:
    if not run.timeline:
        return "the timeline is empty, so the length of the window cannot be verified"
    end_s = run.timeline[-1].end_s
    if run.window.end_s > end_s + TIME_SLACK_S:
        return f"the window ends at {run.window.end_s:g} s, after the run itself ({end_s:g} s)"
    return None


def _numbers_are_finite_and_positive(run: RunLog) -> str | None:
    for name, node in run.nodes.items():
        for field in node.__struct_fields__:
            value = getattr(node, field)
            if isinstance(value, (int, float)) and not (math.isfinite(value) and value >= 0):
                return f"nodes.{name}.{field} is {value}"
    for link in run.links:
        if min(link.payload_bytes, link.messages, link.tokens) < 0:
            return f"link {link.src} -> {link.dst} has a negative count"
    previous = 0.0
    for count in run.timeline:
        if not (math.isfinite(count.end_s) and count.end_s > previous):
            return f"timeline: interval ends must increase, but {count.end_s:g} s follows {previous:g} s"
        if min(count.prompt_tokens, count.output_tokens) < 0:
            return f"timeline: negative count in the interval ending at {count.end_s:g} s"
        previous = count.end_s
    return None


def _timeline_agrees_with_counts(run: RunLog) -> str | None:
    """The window may cut an interval at each end: counts lie between those inside and those that overlap it."""
    touched = tokens_of(
        count
        for start, count in timeline_intervals(run)
        if count.end_s > run.window.start_s and start < run.window.end_s
    )
    whole = tokens_of(count for _, count in intervals_in_window(run))
    counted = run.prompt_tokens + run.output_tokens
    if not whole <= counted <= touched:
        return f"{counted} tokens counted in the window, but its timeline adds up to {whole} .. {touched}"
    return None


def _requests_agree_with_counts(run: RunLog) -> str | None:
    """Requests still running at the end are not listed: at most ``concurrency`` of the longest length."""
    inside = [r for r in run.requests if _is_within(run, r.first_token_s)]
    longest_prompt = max((prompt for prompt, _ in run.workload.lengths), default=0)
    longest_output = max((output for _, output in run.workload.lengths), default=0)
    low = sum(r.prompt_tokens for r in inside)
    high = low + run.concurrency * longest_prompt
    if not low <= run.prompt_tokens <= high:
        return f"{run.prompt_tokens} prompt tokens counted, but the requests account for {low} .. {high}"
    low = sum(r.output_tokens for r in inside if _is_within(run, r.finish_s))
    overlapping = (
        r.output_tokens for r in run.requests if r.finish_s >= run.window.start_s and r.first_token_s < run.window.end_s
    )
    high = sum(overlapping) + run.concurrency * longest_output
    if not low <= run.output_tokens <= high:
        return f"{run.output_tokens} output tokens counted, but the requests account for {low} .. {high}"
    return None


def _is_within(run: RunLog, time_s: float) -> bool:
    return run.window.start_s <= time_s < run.window.end_s


def _never_above_concurrency(run: RunLog) -> str | None:
    # At equal times the end sorts first: a closed loop starts the next request at the instant that one finishes.
    begins = (r.arrival_s if r.admitted_s is None else r.admitted_s for r in run.requests)
    events = sorted([*((begin, 1) for begin in begins), *((r.finish_s, -1) for r in run.requests)])
    in_flight = most = 0
    for _, change in events:
        in_flight += change
        most = max(most, in_flight)
    if most > run.concurrency:
        return f"{most} requests were in flight at once, but the run's concurrency is {run.concurrency}"
    return None


def _ran_its_plan(run: RunLog) -> str | None:
    stated = run.provenance.inputs.get("plan")
    if stated is not None and stated != digest(run.plan):
        return f"it was made from plan {_short(stated)}, but contains plan {_short(digest(run.plan))}"
    ran = set(run.nodes) - {COORDINATOR} | run.adaptation.lost_nodes
    if ran != set(run.plan.placement):
        odd = ", ".join(sorted(ran ^ set(run.plan.placement)))
        return f"the nodes that ran differ from the nodes of its plan: {odd}"
    for pipeline in run.pipelines:
        if fault := _pipeline_fault(run, pipeline):
            return fault
    if any(not 0 <= request.pipeline < len(run.pipelines) for request in run.requests):
        return "a request refers to a pipeline that is not listed"
    return None


def _pipeline_fault(run: RunLog, pipeline: tuple[tuple[str, int, int], ...]) -> str | None:
    reached = 0
    for name, start, end in pipeline:
        placements = (run.plan.placement, *(one.placement for one in run.adaptation.replanned))
        ranges = [placement[name] for placement in placements if name in placement]
        if start != reached or not any(held.start <= start < end <= held.end for held in ranges):
            return f"a pipeline has the hop {name}[{start},{end}) at layer {reached}, which is not in the plan"
        reached = end
    if reached != run.plan.num_layers:
        return f"a pipeline ends at layer {reached} of {run.plan.num_layers}"
    return None


def _short(text: str) -> str:
    return text.removeprefix("sha256:")[:12]


def _not_busier_than_time(run: RunLog) -> str | None:
    for name, node in run.nodes.items():
        iteration_s = node.busy_s / node.iterations if node.iterations else 0.0
        if node.busy_s > run.window.seconds * BUSY_SLACK + BUSY_SLACK_ITERATIONS * iteration_s:
            return f"{name} was busy {node.busy_s:.3g} s in a window of {run.window.seconds:.3g} s"
    return None


# name -> a function that returns the fault, or None
CHECKS: dict[str, Callable[[RunLog], str | None]] = {
    "numbers are finite and not negative": _numbers_are_finite_and_positive,
    "window lies inside the run": _window_inside_run,
    "timeline agrees with the token counts": _timeline_agrees_with_counts,
    "requests agree with the token counts": _requests_agree_with_counts,
    "requests in flight stay within the concurrency": _never_above_concurrency,
    "no node is busy for longer than the window": _not_busier_than_time,
    "nodes and pipelines are those of its plan": _ran_its_plan,
}
