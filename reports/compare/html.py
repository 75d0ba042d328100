"""Two records beside each other as one self-contained page, in the visual language of the other pages."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence

import msgspec

from helixbench.records import Provenance
from helixbench.reference_server.run_log import RunLog
from helixbench.reports.compare.changes import Change, Judgement
from helixbench.reports.compare.compare import Comparison, Record
from helixbench.reports.compare.terminal import changes_in_order
from helixbench.reports.render.flow_picture import flow_picture
from helixbench.reports.render.html import devices_of, regions_of, render
from helixbench.reports.render.text import ratio
from helixbench.solver.problem.plan import Plan

# The scale of the ratios reaches at least and at most so far on either side of 1; what is beyond lies on its edge.
LEAST_REACH, MOST_REACH = math.log(1.1), math.log(4.0)
_CLASSES: dict[Judgement, str] = {"worse": "worse", "better": "better", "changed": "changed", "within noise": "noise"}


class RatioMark(msgspec.Struct, frozen=True):
    """A ratio and its interval on the page's scale, in % of its width; no interval where it is not known."""

    at: float
    low: float | None
    high: float | None


class Row(msgspec.Struct, frozen=True):
    """A change as the page shows it."""

    change: Change
    kind: str
    mark: RatioMark | None


def comparison_page(comparison: Comparison, base: Record, new: Record) -> str:
    """What changed, the worst first, with both records' own pictures over each other."""
    changes = changes_in_order(comparison)
    reach = _reach(changes)
    return render(
        "comparison.html.j2",
        title=f"two {comparison.kind}s: {headline(comparison)}",
        comparison=comparison,
        headline=headline(comparison),
        worst=_CLASSES.get(changes[0].judgement, "") if changes else "noise",
        rows=[Row(change, _CLASSES[change.judgement], _mark(change, reach)) for change in changes],
        unchanged=[change for change in comparison.changes if change.judgement == "unchanged"],
        scale=(ratio(math.exp(-reach)), ratio(math.exp(reach))),
        provenances=_provenance_rows(base.provenance, new.provenance),
        runs=(base, new) if isinstance(base, RunLog) and isinstance(new, RunLog) else None,
        plans=[
            (name, plan, flow_picture(plan, about=devices_of(plan), regions=regions_of(plan)))
            for name, plan in _plans(base, new)
        ],
        nodes=_nodes_of(base, new),
        simulated=[name for name, record in (("base", base), ("new", new)) if getattr(record, "simulated", False)],
        records={"record": comparison, "base": base, "new": new},
    )


def headline(comparison: Comparison) -> str:
    """``2 worse, 1 better, 4 changed``: in which ways; ``changed`` where the noise is not known."""
    counts = Counter(change.judgement for change in comparison.changes)
    said = [f"{counts[word]} {word}" for word in ("worse", "better") if counts[word]]
    if not said and counts["within noise"]:
        said = ["nothing beyond noise"]
    if counts["changed"]:
        said.append(f"{counts['changed']} changed")
    return ", ".join(said) or "nothing changed"


def _plans(base: Record, new: Record) -> list[tuple[str, Plan]]:
    if isinstance(base, Plan) and isinstance(new, Plan):
        return [("base", base), ("new", new)]
    return []


def _nodes_of(base: Record, new: Record) -> list[str]:
    """Nodes of either plan, in the order of the layers that they hold."""
    held = [plan.placement for _, plan in _plans(base, new)]
    names = {name: placement[name] for placement in reversed(held) for name in placement}
    return sorted(names, key=lambda name: (names[name], name))


def _reach(changes: Iterable[Change]) -> float:
    """How far the scale goes on either side of 1, as a logarithm."""
    ends = [LEAST_REACH]
    for change in changes:
        span = (change.interval.low, change.interval.high) if change.interval else ()
        ends += [abs(math.log(value)) for value in (change.ratio, *span) if value is not None and value > 0]
    return min(max(ends) * 1.05, MOST_REACH)


def _mark(change: Change, reach: float) -> RatioMark | None:
    if change.ratio is None or change.ratio <= 0:
        return None
    span = change.interval
    if span is None or span.low <= 0 or span.low == span.high:
        return RatioMark(_place(change.ratio, reach), None, None)
    return RatioMark(_place(change.ratio, reach), _place(span.low, reach), _place(span.high, reach))


def _place(value: float, reach: float) -> float:
    return 50 + 50 * max(-1.0, min(1.0, math.log(value) / reach))


def _provenance_rows(base: Provenance, new: Provenance) -> Sequence[tuple[str, str, str]]:
    """(what, of base, of new) of all that either says."""
    sides = [
        {
            "made": " on ".join(filter(None, [side.created, side.host])),
            "command": side.command,
            "source": side.source,
            "note": side.note,
            **side.versions,
            **{f"from {name}": digest for name, digest in side.inputs.items()},
        }
        for side in (base, new)
    ]
    names = dict.fromkeys(name for side in sides for name, value in side.items() if value)
    return [(name, sides[0].get(name, ""), sides[1].get(name, "")) for name in names]
