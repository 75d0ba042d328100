"""What came of the events of a run: how soon they were noticed, and what was served before and after."""

from __future__ import annotations

import bisect
import itertools
import math
import statistics
from collections.abc import Sequence

import msgspec

from helixbench.profiler.cluster import ClusterProfile
from helixbench.reference_server.run_log import AdaptationLog, Happened, RequestRecord, Transition
from helixbench.solver.expected.after import expected_after
from helixbench.solver.problem.plan import Plan

SETTLED_ROUNDS = 1.5
"""Times the median request's time: so long after an event, requests of before it have left."""

_Count = tuple[float, int, int]  # (time, prompt tokens, output tokens)


def with_effects(
    log: AdaptationLog, counts: Sequence[_Count], finished: Sequence[RequestRecord], end_s: float
) -> AdaptationLog:
    """The log, each of its events with what came of it.

    Args:
        log: of the run.
        counts: tokens as clients saw them, by time.
        finished: requests.
        end_s: of the run.
    """
    if not log.events or not finished:
        return log
    round_s = statistics.median(one.finish_s - one.arrival_s for one in finished)
    times = [at_s for at_s, _, _ in counts]
    edges = sorted({event.at_s for event in log.events} | {0.0, end_s})
    rates = {}  # beginning of a time between two events -> tokens/s served in it, once settled
    for begin_s, until_s in itertools.pairwise(edges):
        settled_s = begin_s + SETTLED_ROUNDS * round_s
        if until_s - settled_s >= round_s:
            inside = counts[bisect.bisect_left(times, settled_s) : bisect.bisect_left(times, until_s)]
            rates[begin_s] = sum(prompt + output for _, prompt, output in inside) / (until_s - settled_s)

    def effect(event: Happened) -> Happened:
        noticed = [change.at_s - event.at_s for change in log.transitions if _is_about(change, event)]
        before_s = edges[edges.index(event.at_s) - 1]
        return msgspec.structs.replace(
            event,
            detected_s=min(noticed, default=None),
            before_tokens_per_s=rates.get(before_s),
            after_tokens_per_s=rates.get(event.at_s),
        )

    return msgspec.structs.replace(log, events=tuple(effect(event) for event in log.events))


def _is_about(change: Transition, event: Happened) -> bool:
    """Whether a change of state follows from the event, as far as its place and time tell."""
    if change.at_s < event.at_s or bool(change.peer) != bool(event.peer):
        return False
    return {change.node, change.peer} == {event.node, event.peer}


def with_predictions(log: AdaptationLog, plan: Plan, profile: ClusterProfile, concurrency: int | None) -> AdaptationLog:
    """The log, each of its events with what is expected after it, of nodes as the events so far left them.

    Source: the plan's own profile and placement; nothing of the run enters.
    """
    lost: set[str] = set()
    ratios: dict[str, float] = {}
    events = []
    for event in log.events:
        kind, factor = event.kind, event.factor
        if kind in ("kill", "freeze", "drain"):
            lost.add(event.node)
        elif kind in ("join", "resume"):
            lost.discard(event.node)
        elif kind == "slow":
            assert factor is not None
            ratios[event.node] = factor
        if event.peer:
            events.append(event)  # what is expected where a link fails is not computed
            continue
        expected = expected_after(plan, profile, lost=lost, ratios=ratios, concurrency=concurrency)
        tokens_per_s = _moved_to(log, event) if expected is None else expected.total_tokens_per_s
        events.append(msgspec.structs.replace(event, predicted_tokens_per_s=tokens_per_s))
    return msgspec.structs.replace(log, events=tuple(events))


def _moved_to(log: AdaptationLog, event: Happened) -> float:
    """Where the nodes that are left do not cover the model: what is expected once layers were moved; else nothing."""
    later = [other.at_s for other in log.events if other.at_s > event.at_s]
    moved = [one for one in log.replanned if event.at_s <= one.at_s < min(later, default=math.inf)]
    return moved[-1].expected_tokens_per_s or 0.0 if moved else 0.0
