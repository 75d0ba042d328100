"""A run in which something happened says so, in the terminal and on its page."""

from __future__ import annotations

import msgspec

from helixbench.reference_server.run_log import AdaptationLog, Happened, Recovered, RunLog, Transition
from helixbench.reports.render.html import html_page
from helixbench.reports.render.summaries import run_summary
from helixbench.reports.verdict.validate import validate
from tests.reports.report_examples import example_run

LOG = AdaptationLog(
    transitions=(
        Transition(at_s=10.2, node="a", before="progressing", after="lost", cause="its connection is closed"),
        Transition(at_s=11.0, node="a", peer="b", before="up", after="down", cause="it answers nothing on this link"),
    ),
    recovered=(
        Recovered(at_s=10.2, replayed=3, prefilled=1, moved=0, waited=2, layer_tokens_again=50, layer_tokens_held=200),
    ),
    events=(
        Happened(
            at_s=10.0,
            kind="kill",
            node="a",
            detected_s=0.2,
            before_tokens_per_s=100.0,
            after_tokens_per_s=63.0,
            predicted_tokens_per_s=60.0,
        ),
        Happened(at_s=20.0, kind="slow", node="b", factor=2.0),
    ),
)


def run_with(log: AdaptationLog) -> RunLog:
    return msgspec.structs.replace(example_run(), adaptation=log)


def test_events_stand_beside_what_was_predicted_after_them() -> None:
    sections = {section.title: section for section in run_summary(run_with(LOG)).sections}

    kill, slow = sections["Events"].rows
    assert kill == ("10 s", "kill a", "200 ms", "100.0", "63", "60", "1.050")
    assert slow[1] == "slow b x 2"
    assert sections["Recovered requests"].rows == (("10.2 s", "3", "1", "", "2", "25 %"),)
    assert [change for _, change in sections["Changes of state"].rows] == [
        "node a: progressing -> lost, its connection is closed",
        "link a -> b: up -> down, it answers nothing on this link",
    ]


def test_a_run_in_which_nothing_happened_says_nothing_of_it() -> None:
    titles = {section.title for section in run_summary(run_with(AdaptationLog())).sections}
    assert not titles & {"Events", "Recovered requests", "Changes of state"}
    assert 'id="event-table"' not in html_page(run_with(AdaptationLog()))


def test_the_page_has_the_events() -> None:
    page = html_page(run_with(LOG))
    assert 'id="event-table"' in page
    assert "node a: progressing -&gt; lost" in page


def test_a_node_that_was_lost_is_missing_from_the_figures_and_nothing_else_is() -> None:
    run = example_run()
    lost, *others = run.plan.placement
    change = Transition(at_s=1.0, node=lost, before="idle", after="lost", cause="its connection is closed")
    left = msgspec.structs.replace(
        run,
        nodes={name: use for name, use in run.nodes.items() if name != lost},
        emulated=(lost, *others),
        adaptation=AdaptationLog(transitions=(change,)),
    )

    sections = {section.title: section for section in run_summary(left).sections}
    assert {row[0] for row in sections["Nodes"].rows} == set(run.nodes) - {lost}
    assert html_page(left)
    assert left.late_share == 0
    checks = {check.name: check.is_passed for check in validate(left).checks}
    assert checks["nodes and pipelines are those of its plan"]
    without = msgspec.structs.replace(left, adaptation=AdaptationLog())
    assert not {check.name: check.is_passed for check in validate(without).checks}[
        "nodes and pipelines are those of its plan"
    ], "where nothing was lost, a missing node is a fault"
