"""The min cut in words: what limits a plan, and what more of it would give."""

from __future__ import annotations

from collections.abc import Mapping

from .capacity import Capacities
from .flow import CutShare, Flow
from .plan import LayerRange

MAX_LINES = 4


def describe(capacities: Capacities, placement: Mapping[str, LayerRange], flow: Flow) -> tuple[str, ...]:
    """One line for each group of alike resources in the min cut, the one that accounts for most first."""
    groups: dict[tuple[str, str], list[CutShare]] = {}
    for share in flow.cut:
        groups.setdefault((share.kind, _label(capacities, placement, share)), []).append(share)
    largest = sorted(groups.items(), key=lambda item: -sum(share.tokens_per_s for share in item[1]))
    return tuple(_line(label, shares, flow) for (_, label), shares in largest[:MAX_LINES])


def _label(capacities: Capacities, placement: Mapping[str, LayerRange], share: CutShare) -> str:
    if share.kind == "node":
        return f"{capacities.nodes[share.name].device.name} at layers {placement[share.name]}"
    if share.kind == "link":
        return f"link {share.name}"
    return f"network card of {share.name}, {'sending' if share.kind == 'nic out' else 'receiving'}"


def _line(label: str, shares: list[CutShare], flow: Flow) -> str:
    total = sum(share.tokens_per_s for share in shares)
    names = f" ({', '.join(share.name for share in shares)})" if shares[0].kind == "node" else ""
    return f"{label}{names}: full, {total / flow.tokens_per_s:.0%} of the max-flow passes here"
