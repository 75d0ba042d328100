"""What happened to nodes and links in a run, and what was done about it: sections of its summary."""

from __future__ import annotations

from collections.abc import Iterator

from helixbench.reference_server.run_log import AdaptationLog, Happened, Recovered, Replanned
from helixbench.reports.formatting import number, percent, ratio, seconds
from helixbench.reports.render.document import Row, Section, section

EVENT_COLUMNS = (">at", "event", ">noticed after", ">before", ">after", ">predicted after", ">after / predicted")
MAX_TRANSITIONS = 16


def adaptation_sections(log: AdaptationLog) -> Iterator[Section]:
    """Events, requests that went on another way, and changes of state; nothing where nothing happened."""
    if log.is_empty:
        return
    yield section("Events", "total tokens/s, settled", EVENT_COLUMNS, map(event_row, log.events), is_detail=False)
    yield section(
        "Recovered requests",
        "that lost their pipeline, by how they went on",
        (">at", ">replayed", ">prefilled again", ">moved", ">waited", ">computed again"),
        map(_recovered_row, log.recovered),
        lines=[f"weights were set anew {len(log.reweighted)} times"] if log.reweighted else [],
    )
    yield section(
        "Changes of state",
        "",
        (">at", "change"),
        ((seconds(change.at_s), change.line) for change in log.transitions),
        most=MAX_TRANSITIONS,
        lines=map(_replanned_line, log.replanned),
    )


def event_row(event: Happened) -> Row:
    """What came of an event, under ``EVENT_COLUMNS``."""
    after, predicted = event.after_tokens_per_s, event.predicted_tokens_per_s
    return (
        seconds(event.at_s),
        event.what,
        seconds(event.detected_s),
        number(event.before_tokens_per_s),
        number(after),
        number(predicted),
        ratio(after / predicted if after is not None and predicted else None),
    )


def _replanned_line(one: Replanned) -> str:
    placement = ", ".join(f"{node} {held}" for node, held in sorted(one.placement.items(), key=lambda item: item[1]))
    expected = "" if one.expected_tokens_per_s is None else f"; {number(one.expected_tokens_per_s)} tokens/s expected"
    why = "the nodes that were left did not cover the model, so layers were moved"
    return f"{seconds(one.at_s)}: {why}: {placement}{expected}"


def _recovered_row(one: Recovered) -> Row:
    again = one.layer_tokens_again / one.layer_tokens_held if one.layer_tokens_held else 0.0
    counts = (str(count) if count else "" for count in (one.replayed, one.prefilled, one.moved, one.waited))
    return (seconds(one.at_s), *counts, percent(again))
