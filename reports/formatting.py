"""Numbers and bars as text: one format for the terminal, the page and Markdown. Bars are legible without colour."""

from __future__ import annotations

import math

from helixbench.reports.verdict.verdict import Interval
from helixbench.solver.problem.plan import LayerRange

FULL, EMPTY = "█", "·"
ARROW, TIMES = "→", "×"
MISSING = "-"
_ASCII = str.maketrans({FULL: "#", EMPTY: ".", ARROW: ">", TIMES: "x", "…": ".", "–": "-"})
_SI = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def to_ascii(text: str) -> str:
    """The same text in ASCII, column for column, for terminals that are not UTF-8."""
    return text.translate(_ASCII).encode("ascii", "replace").decode("ascii")


def number(value: float | None) -> str:
    """About four significant digits: ``97.2``, ``1,234``, ``275k``, ``12.0M``; ``-`` for none."""
    if value is None:
        return MISSING
    if abs(value) >= 1e5:
        scale, suffix = next(entry for entry in _SI if abs(value) >= 0.9995 * entry[0])  # 999,999 is 1M
        return f"{value / scale:.3g}{suffix}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.1f}"


def interval(value: Interval | None) -> str:
    """``[356, 394]``; empty for none."""
    return f"[{number(value.low)}, {number(value.high)}]" if value else ""


def seconds(value: float | None) -> str:
    """``1.02 s``, ``98.0 ms``, ``240 us``; ``-`` for none."""
    if value is None:
        return MISSING
    if value >= 1:
        return f"{value:.3g} s"
    return f"{value * 1e3:.3g} ms" if value >= 1e-3 or value == 0 else f"{value * 1e6:.3g} us"


def percent(share: float | None, digits: int = 0) -> str:
    """``46 %``; ``-`` for none."""
    return MISSING if share is None else f"{share * 100:.{digits}f} %"


def signed_percent(share: float | None) -> str:
    """``+4 %``; ``-`` for none."""
    return MISSING if share is None else f"{share * 100:+.0f} %"


def points(difference: float) -> str:
    """Difference of two shares in percentage points: ``+1.2 points``."""
    rounded = round(difference * 100, 1) + 0.0
    return f"{rounded:+.1f} points" if rounded else "0 points"


def ratio(value: float | None) -> str:
    """``0.982``; ``-`` for none."""
    return MISSING if value is None else f"{value:.3f}"


def size(num_bytes: float) -> str:
    """Decimal bytes: ``1.50 GB``."""
    for scale, suffix in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.3g} {suffix}"
    return f"{num_bytes:.0f} B"


def flop_rate(flops_per_s: float) -> str:
    """Floating-point operations per second: ``312 TFLOP/s``."""
    for scale, suffix in ((1e12, "TFLOP/s"), (1e9, "GFLOP/s"), (1e6, "MFLOP/s")):
        if flops_per_s >= scale:
            return f"{flops_per_s / scale:.3g} {suffix}"
    return f"{flops_per_s:.0f} FLOP/s"


def bit_rate(bytes_per_s: float) -> str:
    """Decimal bits per second, as link speeds are quoted: ``400 Mbit/s``."""
    bits = bytes_per_s * 8
    for scale, suffix in ((1e9, "Gbit/s"), (1e6, "Mbit/s"), (1e3, "kbit/s")):
        if bits >= scale:
            return f"{bits / scale:.3g} {suffix}"
    return f"{bits:.0f} bit/s"


def share_bar(share: float, width: int) -> str:
    """A bar filled to ``share``: any share above 0 shows, and only 1 fills it."""
    if not math.isfinite(share) or share <= 0:
        return EMPTY * width
    filled = min(width, max(1, math.floor(share * width + 1e-9)))
    return FULL * filled + EMPTY * (width - filled)


def layer_bar(held: LayerRange, num_layers: int, width: int) -> str:
    """A layer range drawn over ``[0, num_layers)``, at least one character wide."""
    start = min(width - 1, held.start * width // num_layers)
    end = max(start + 1, -(-held.end * width // num_layers))
    return EMPTY * start + FULL * (end - start) + EMPTY * (width - end)


def metric_name(name: str) -> str:
    """``total tokens/s`` for ``total_tokens_per_s``, ``TTFT p50`` for ``ttft_p50_s``; other names as they are."""
    kind, _, rest = name.partition("_")
    if rest == "tokens_per_s":
        return f"{kind} tokens/s"
    return f"{kind.upper()} {rest.removesuffix('_s')}" if kind in ("ttft", "tpot") else name


def link_name(src: str, dst: str) -> str:
    """``a → b``."""
    return f"{src} {ARROW} {dst}"
