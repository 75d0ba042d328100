"""Bar chart of a study as one self-contained SVG: output tokens/s by placement and routing, one panel per load."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from xml.sax.saxutils import escape

from benchmarks.study.runs import StudyResult, StudyRow

_COLOURS = ("#2f6f9f", "#d98c3f", "#5b9a5b", "#a05195", "#8a8a8a")
_WIDTH, _LABEL, _VALUE, _BAR, _GAP, _PANEL = 760, 190, 130, 14, 8, 44


def study_svg(result: StudyResult) -> str:
    """Bars of mean output tokens/s over the seeds, with a whisker from the lowest to the highest seed.

    The label adds the total in parentheses. Output tokens are charted because in a window that has not settled the
    total counts prompts whose requests are still running.
    """
    parts: list[str] = []
    routings = list(dict.fromkeys(row.routing for row in result.rows))
    y = 58
    for cluster, workload in dict.fromkeys((row.cluster, row.workload) for row in result.rows):
        inside = [row for row in result.rows if (row.cluster, row.workload) == (cluster, workload)]
        most = max((row.output_tokens_per_s or 0.0 for row in inside), default=0.0) or 1.0
        parts.append(_text(10, y, f"{cluster}: {workload}", weight="bold"))
        y += 12
        for placement in dict.fromkeys(row.placement for row in inside):
            y = _bars(parts, [row for row in inside if row.placement == placement], routings, most, y)
        y += _PANEL - _BAR
    head = [_text(10, 20, f"{result.title} (simulated): output tokens/s (all tokens/s)", weight="bold", size=15)]
    x = 10
    for number, routing in enumerate(routings):
        head.append(f'<rect x="{x}" y="30" width="12" height="12" fill="{_colour(number)}"/>')
        head.append(_text(x + 16, 40, routing))
        x += 34 + 8 * len(routing)
    body = "\n".join([*head, *parts])
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {y}" width="{_WIDTH}" height="{y}" '
        f'font-family="sans-serif" font-size="12">\n<rect width="100%" height="100%" fill="white"/>\n{body}\n</svg>\n'
    )


def _bars(parts: list[str], rows: Sequence[StudyRow], routings: Sequence[str], most: float, y: int) -> int:
    """Draw one placement, a bar per routing; returns the y of the next placement."""
    parts.append(_text(10, y + _BAR - 3, rows[0].placement))
    room = _WIDTH - _LABEL - _VALUE
    for number, routing in enumerate(routings):
        routed = [row for row in rows if row.routing == routing]
        values = [row.output_tokens_per_s for row in routed if row.output_tokens_per_s is not None]
        totals = [row.total_tokens_per_s for row in routed if row.total_tokens_per_s is not None]
        if values:
            mean = statistics.fmean(values)
            width = room * mean / most
            parts.append(
                f'<rect x="{_LABEL}" y="{y}" width="{width:.1f}" height="{_BAR - 3}" fill="{_colour(number)}"/>'
            )
            if len(values) > 1:
                low, high = (_LABEL + room * value / most for value in (min(values), max(values)))
                middle = y + (_BAR - 3) / 2
                parts.append(
                    f'<path d="M{low:.1f} {middle}H{high:.1f}M{low:.1f} {middle - 3}v6M{high:.1f} {middle - 3}v6" '
                    'stroke="black" fill="none"/>'
                )
            beside = f" ({statistics.fmean(totals):.0f})" if totals else ""
            parts.append(_text(_LABEL + width + 6, y + _BAR - 4, f"{mean:.0f}{beside}"))
        else:
            problem = next((row.problem for row in routed if row.problem), "not run")
            parts.append(_text(_LABEL, y + _BAR - 4, problem[:80]))
        y += _BAR
    return y + _GAP


def _text(x: float, y: float, text: str, *, weight: str = "normal", size: int = 12) -> str:
    return f'<text x="{x:.1f}" y="{y}" font-weight="{weight}" font-size="{size}">{escape(text)}</text>'


def _colour(number: int) -> str:
    return _COLOURS[number % len(_COLOURS)]
