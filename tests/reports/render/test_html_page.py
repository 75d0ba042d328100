from __future__ import annotations

import html.parser
import re

import msgspec
import pytest

from helixbench.profiler.cluster import ClusterProfile
from helixbench.reference_server.run_log import NodePoint, RunLog
from helixbench.reports.render.document import Document, Section
from helixbench.reports.render.flow_picture import flow_picture
from helixbench.reports.render.html import html_page
from helixbench.reports.render.markdown import MAX_CHARACTERS, escape, markdown
from helixbench.reports.render.summaries import run_summary
from helixbench.reports.verdict.validate import validate
from helixbench.reports.verdict.verdict import Verdict
from helixbench.solver.problem.plan import LayerRange, Plan
from tests.reports.report_examples import example_plan, example_profile, example_run

replace = msgspec.structs.replace
RUN = example_run()


def embedded(page: str, element: str) -> str:
    found = re.search(rf'<script type="application/json" id="{element}">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    return found.group(1)


class Cells(html.parser.HTMLParser):
    """``data-value`` of every cell, by the id of its table and in order; and every tag that was seen."""

    def __init__(self) -> None:
        super().__init__()
        self.table = ""
        self.values: dict[str, list[str]] = {}
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        if tag == "table":
            self.table = named.get("id") or ""
        if tag == "td" and named.get("data-value"):
            self.values.setdefault(self.table, []).append(str(named["data-value"]))
        self.links += [str(value) for name, value in attrs if name in ("src", "href")]


def cells(page: str) -> Cells:
    parser = Cells()
    parser.feed(page)
    return parser


@pytest.mark.parametrize(
    ("record", "kind"), [(RUN, RunLog), (example_plan(), Plan), (example_profile(), ClusterProfile)]
)
def test_the_record_is_embedded_whole(record: RunLog | Plan | ClusterProfile, kind: type[msgspec.Struct]) -> None:
    assert msgspec.json.decode(embedded(html_page(record), "record"), type=kind) == record


@pytest.mark.parametrize("record", [RUN, example_plan(), example_profile()])
def test_a_page_asks_for_nothing_from_elsewhere(record: RunLog | Plan | ClusterProfile) -> None:
    page = html_page(record)

    assert cells(page).links == ["data:,"]
    assert not re.search(r"@import|url\((?!#)", page)


def test_numbers_on_the_page_are_the_verdicts() -> None:
    page = html_page(RUN)
    verdict = validate(RUN)

    assert msgspec.json.decode(embedded(page, "verdict"), type=Verdict) == verdict
    values = cells(page).values
    headline = (verdict.bound_tokens_per_s, verdict.expected_tokens_per_s, verdict.measured_tokens_per_s)
    assert [float(v) for v in values["headline"]] == list(headline)
    ttft = verdict.latencies[0]
    assert [float(v) for v in values["latency-table"][:4]] == [ttft.p50_s, ttft.p90_s, ttft.p99_s, ttft.mean_s]
    small = verdict.nodes[0]
    assert [float(v) for v in values["node-table"][1:5]] == [
        small.planned_share,
        small.realised_share,
        small.predicted_busy,
        small.measured_busy,
    ]


def test_names_from_the_record_cannot_become_markup() -> None:
    nasty = "</script><script>alert(1)</script><!--"
    plan = replace(RUN.plan, model=nasty)

    page = html_page(replace(RUN, plan=plan, testbed=nasty))

    assert "<script>alert" not in page
    assert "<!--" not in page
    assert msgspec.json.decode(embedded(page, "record"), type=RunLog).testbed == nasty


def test_a_run_that_could_not_be_measured_has_a_page() -> None:
    page = html_page(replace(RUN, requests=(), timeline=(), concurrency=3))

    assert "Could not measure" in page
    assert "no prediction" in page


def test_series_of_nodes_have_a_chart_where_there_are_any() -> None:
    points = tuple(NodePoint(float(i + 1), 8.0, 100 * i, 0.5) for i in range(48))

    assert 'id="kv-chart"' in html_page(replace(RUN, node_timeline={"mid": points}))
    assert 'id="kv-chart"' not in html_page(RUN)


def test_boxes_never_overlap_and_stay_in_the_picture() -> None:
    picture = flow_picture(example_plan())

    for box in picture.boxes:
        assert box.x > 0
        assert box.x + box.width < picture.width
        for other in picture.boxes:
            apart = box.y != other.y or box.x + box.width <= other.x or other.x + other.width <= box.x
            assert box is other or apart


def test_an_arrow_is_as_wide_as_its_flow() -> None:
    arrows = {(arrow.src, arrow.dst): arrow for arrow in flow_picture(example_plan()).arrows}

    wide, narrow = arrows[("mid", "coordinator")], arrows[("small", "mid")]
    assert wide.stroke / narrow.stroke == pytest.approx(400 / 120)


def test_partial_inference_enters_the_box_at_its_layer() -> None:
    plan = example_plan()
    picture = flow_picture(plan)

    mid = next(box for box in picture.boxes if box.name == "mid")
    arrows = {(arrow.src, arrow.dst): arrow for arrow in picture.arrows}
    end_x = {src: float(arrows[(src, "mid")].path.split()[-2]) for src in ("big", "small")}
    assert plan.placement["mid"] == LayerRange(8, 16)
    assert end_x["small"] == pytest.approx(mid.x, abs=0.1)
    assert mid.x < end_x["big"] < mid.x + mid.width


def test_markdown_leads_with_the_verdict_and_the_worst_node() -> None:
    text = markdown(run_summary(example_run(speed=0.8)))

    assert text.startswith("### helixbench run: below expected")
    nodes = text.split("<summary>Nodes")[1]
    assert nodes.index("| mid |") < nodes.index("| small |")


def test_markdown_stays_within_a_comment() -> None:
    text = markdown(
        Document(kind="run", title="first", sections=tuple(Section(title="x", lines=("x" * 1000,)) for _ in range(100)))
    )

    assert len(text) <= MAX_CHARACTERS + 100
    assert text.startswith("### helixbench run: first")
    assert "Truncated" in text


def test_markdown_from_a_record_cannot_become_markup() -> None:
    assert escape("a|b <b> @all\n# x") == "a\\|b &lt;b> @\u200ball # x"
