"""A small SVG: curves of tokens/s over seconds on logarithmic axes, each a staircase that holds its last value."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 820, 420
LEFT, RIGHT, TOP, BOTTOM = 80, 270, 30, 50
STYLE = (
    "text{font:13px system-ui,sans-serif;fill:#24292f}.axis{stroke:#8c959f;stroke-width:1}"
    ".grid{stroke:#d0d7de;stroke-width:.6}.curve{fill:none;stroke-width:2}.bound{stroke-dasharray:6 4}"
    "svg{background:#fff}"
)


@dataclass(frozen=True)
class Curve:
    """``points`` are (seconds, tokens/s) in order; ``is_bound`` draws it dashed."""

    name: str
    colour: str
    points: Sequence[tuple[float, float]]
    is_bound: bool


def time_plot(title: str, curves: Sequence[Curve], *, until_s: float) -> str:
    """The SVG. A curve without points is named in the legend as having found nothing."""
    seconds = [s for curve in curves for s, _ in curve.points]
    values = [value for curve in curves for _, value in curve.points]
    low_s, high_s = _decades(min(seconds, default=0.1), until_s)[0], until_s
    low, high = _decades(min(values, default=1.0), max(values, default=10.0))

    def x(s: float) -> float:
        share = (math.log10(max(s, low_s)) - math.log10(low_s)) / (math.log10(high_s) - math.log10(low_s))
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        share = (math.log10(value) - math.log10(low)) / (math.log10(high) - math.log10(low))
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    right, foot = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(title)}"><style>{STYLE}</style><rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        f'<text x="{LEFT}" y="18">{escape(title)}</text>',
    ]
    for s in _powers(low_s, high_s):
        parts.append(f'<line class="grid" x1="{x(s):.1f}" x2="{x(s):.1f}" y1="{TOP}" y2="{foot}"/>')
        parts.append(f'<text x="{x(s):.1f}" y="{foot + 18}" text-anchor="middle">{s:g} s</text>')
    for value in _powers(low, high):
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y(value) + 4:.1f}" text-anchor="end">{value:,.0f}</text>')
    parts.append(f'<path class="axis" fill="none" d="M{LEFT} {TOP}V{foot}H{right}"/>')
    for number, curve in enumerate(curves):
        kind = "curve bound" if curve.is_bound else "curve"
        name, at = curve.name, TOP + 14 + 24 * number
        if curve.points:
            steps = "".join(f"H{x(s):.1f}V{y(value):.1f}" for s, value in curve.points[1:])
            first_s, first = curve.points[0]
            path = f"M{x(first_s):.1f} {y(first):.1f}{steps}H{x(until_s):.1f}"
            parts.append(f'<path class="{kind}" stroke="{curve.colour}" d="{path}"/>')
        else:
            name += " (none)"
        parts.append(
            f'<line class="{kind}" stroke="{curve.colour}" x1="{right + 14}" x2="{right + 44}" y1="{at}" y2="{at}"/>'
            f'<text x="{right + 50}" y="{at + 4}">{escape(name)}</text>'
        )
    parts.append(f'<text x="{right}" y="{foot + 38}" text-anchor="end">since the program began to be built</text>')
    parts.append(f'<text x="{LEFT}" y="{foot + 38}">max-flow, tokens/s</text></svg>')
    return "\n".join(parts) + "\n"


def _decades(low: float, high: float) -> tuple[float, float]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    return 10.0**first, 10.0 ** max(last, first + 1)


def _powers(low: float, high: float) -> list[float]:
    return [10.0**power for power in range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)]
