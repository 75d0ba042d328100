"""A network profile on a terminal: matrices, network cards, message sizes, and what is doubtful."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence

from rich.console import Console
from rich.table import Table

from helixbench.profiler.network.message_times import OFF_BY, misses, ratios
from helixbench.profiler.network.nics import Card
from helixbench.profiler.network.records import MeasuredLink, NetworkProfile

_MBIT = 1e6 / 8  # bytes/s
COLUMNS_AT_ONCE = 8  # that fit 80 characters; the others follow below
_MAX_NAME = 14
_MAX_LINES = 5


def show_network(profile: NetworkProfile, console: Console) -> None:
    """Print all of it."""
    for line in headlines(profile):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    _print_matrix(profile, console, "Bandwidth in Mbit/s, from the row's node to the column's", _bandwidth_cell)
    _print_matrix(profile, console, "Latency one way in ms, half a round trip of the server's transport", _latency_cell)
    _print_cards(profile.cards, console)
    _print_messages(profile.links, console)
    for line in doubts(profile.links):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def headlines(profile: NetworkProfile) -> list[str]:
    """What was measured, on what, in which time, and why not all of it."""
    sources = sorted({link.source for link in profile.links if link.source})
    lines = [
        f"{len(profile.links)} links of {len(profile.nodes)} nodes in {profile.seconds:.0f} s by {', '.join(sources)}"
    ]
    if profile.testbed:
        lines.append(f"testbed: {profile.testbed}")
    if profile.cut_short:
        lines.append(f"CUT SHORT: {profile.cut_short}")
    return lines


def doubts(links: Iterable[MeasuredLink]) -> list[str]:
    """A line for each link that is doubtful, or was found odd and confirmed."""
    lines = []
    for link in links:
        tried = ", ".join(mbit(rate) for rate in link.attempts_bytes_per_s)
        measured = f" (measured {tried} Mbit/s)" if tried else ""
        if link.suspect:
            lines.append(f"? {link.src} -> {link.dst} is doubtful: {link.suspect}{measured}")
        elif link.note:
            lines.append(f"! {link.src} -> {link.dst}: {link.note}{measured}")
    return lines


def mbit(bytes_per_s: float) -> str:
    """Mbit/s in three digits or all that there are."""
    value = bytes_per_s / _MBIT
    return f"{value:.2f}" if value < 9.995 else f"{value:.1f}" if value < 99.95 else f"{value:.0f}"


def _bandwidth_cell(link: MeasuredLink) -> str:
    mark = "?" if link.suspect else ""
    return mark if link.bandwidth_bytes_per_s is None else mbit(link.bandwidth_bytes_per_s) + mark


def _latency_cell(link: MeasuredLink) -> str:
    return "?" if link.latency_s is None else f"{link.latency_s * 1e3:.2f}"


def _print_matrix(
    profile: NetworkProfile, console: Console, title: str, cell_of: Callable[[MeasuredLink], str]
) -> None:
    names = profile.nodes
    by_pair = {(link.src, link.dst): link for link in profile.links}
    console.print(f"\n{title}", highlight=False)
    for first in range(0, len(names), COLUMNS_AT_ONCE):
        shown = names[first : first + COLUMNS_AT_ONCE]
        table = Table(box=None, padding=(0, 1, 0, 0), show_edge=False)
        table.add_column("", justify="right")
        table.add_column("", no_wrap=True)
        for offset in range(len(shown)):
            table.add_column(str(first + offset + 1), justify="right", no_wrap=True, min_width=5)
        for index, src in enumerate(names):
            cells = ["-" if src == dst else _cell(by_pair.get((src, dst)), cell_of) for dst in shown]
            table.add_row(str(index + 1), _short(src), *cells)
        console.print(table, highlight=False)


def _cell(link: MeasuredLink | None, cell_of: Callable[[MeasuredLink], str]) -> str:
    return "" if link is None else cell_of(link)


def _short(name: str) -> str:
    return name if len(name) <= _MAX_NAME else name[: _MAX_NAME - 1] + "…"


def _print_cards(cards: Sequence[Card], console: Console) -> None:
    if not cards:
        return
    table = Table(box=None, padding=(0, 1, 0, 0), show_edge=False)
    for heading in ("node", "", "at once", "alone", "best"):
        table.add_column(heading, justify="left" if heading in ("node", "") else "right", no_wrap=True)
    table.add_column("")
    for card in cards:
        at_once = "" if card.at_once_bytes_per_s is None else mbit(card.at_once_bytes_per_s)
        table.add_row(
            _short(card.node),
            card.direction,
            at_once,
            mbit(card.alone_bytes_per_s),
            mbit(card.best_bytes_per_s),
            _verdict(card),
        )
    console.print("\nNetwork cards in Mbit/s: all links at once, their sum alone, the best alone")
    console.print(table, highlight=False)


def _verdict(card: Card) -> str:
    if card.is_shared is None:
        return f"not known: {card.problem or 'one link'}"
    return "links share it" if card.is_shared else "no limit seen"


def _print_messages(links: Sequence[MeasuredLink], console: Console) -> None:
    whole = [link.link() for link in links if link.message_times and link.bandwidth_bytes_per_s is not None]
    if not whole:
        return
    table = Table(box=None, padding=(0, 1, 0, 0), show_edge=False)
    for heading in ("bytes", "ms", "Mbit/s", "to model", "least", "most", "links"):
        table.add_column(heading, justify="right", no_wrap=True)
    for size in sorted({time.message_bytes for link in whole for time in link.message_times}):
        seconds = [t.one_way_s for link in whole for t in link.message_times if t.message_bytes == size]
        against = [ratio for link in whole for bytes_, ratio in ratios(link) if bytes_ == size]
        middle = statistics.median(seconds)
        table.add_row(
            str(size),
            f"{middle * 1e3:.2f}",
            mbit(size / middle),
            f"{statistics.median(against):.2f}",
            f"{min(against):.2f}",
            f"{max(against):.2f}",
            str(len(seconds)),
        )
    console.print("\nMessages over the server's transport, one way, against latency + bytes/bandwidth")
    console.print(table, highlight=False)
    off = misses(whole)
    if off:
        console.print(f"The model is off by more than {OFF_BY:.0%} on {len(off)} of {len(whole)} links, most on:")
    for miss in off[:_MAX_LINES]:
        console.print(
            f"  {miss.src} -> {miss.dst}: {miss.message_bytes} bytes in {miss.one_way_s * 1e3:.2f} ms, "
            f"{miss.ratio:.2f} of the model",
            highlight=False,
            markup=False,
        )
