"""Whether the plan is worth its nodes: what the best of them gives alone."""

from __future__ import annotations

from collections.abc import Mapping

from .assemble import Question, carrying, expected_of
from .plan import LayerRange

WORTH = 0.95
"""Of the plan's expected: a node that gives as much alone makes the rest a waste."""


def verdicts(question: Question, placement: Mapping[str, LayerRange]) -> tuple[str, ...]:
    """A note where one node alone gives nearly as much as the plan."""
    capacities = question.capacities
    if len(placement) < 2:
        return ()
    whole = LayerRange(0, capacities.model.num_layers)
    together = expected_of(question, placement, carrying(question, placement, spread=True), question.concurrency)
    seen: set[int] = set()
    alone: list[tuple[float, str]] = []
    for name in capacities.nodes:
        if capacities.kind(name) in seen or not capacities.can_hold(name, whole):
            continue
        seen.add(capacities.kind(name))
        flow = carrying(question, {name: whole})
        if flow.tokens_per_s > 0:
            expected = expected_of(question, {name: whole}, flow, question.concurrency)
            alone.append((expected.total_tokens_per_s, name))
    if not alone or max(alone)[0] < WORTH * together.total_tokens_per_s:
        return ()
    tokens_per_s, name = max(alone)
    return (f"not worth distributing: {name} alone gives {tokens_per_s / together.total_tokens_per_s:.0%} of it",)
