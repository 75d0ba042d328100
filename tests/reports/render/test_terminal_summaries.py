from __future__ import annotations

import io

import msgspec
import pytest
from rich.console import Console

from helixbench.reference_server.run_log import OutputCheck
from helixbench.reports.formatting import layer_bar, number, seconds, share_bar, to_ascii
from helixbench.reports.render.document import Document
from helixbench.reports.render.summaries import plan_summary, profile_summary, run_summary
from helixbench.reports.render.terminal import draw
from helixbench.solver.problem.plan import LayerRange, LinkFlow, NodeFlow
from tests.reports.report_examples import NOT_SHAPED, example_plan, example_profile, example_run

replace = msgspec.structs.replace

SUMMARIES = {
    "profile": lambda: profile_summary(example_profile()),
    "plan": lambda: plan_summary(example_plan(), example_profile()),
    "plan alone": lambda: plan_summary(example_plan()),
    "run": lambda: run_summary(example_run()),
    "run that could not be measured": lambda: run_summary(replace(example_run(), concurrency=3, requests=())),
}


def printed(document: Document, *, width: int = 80, is_terminal: bool = False) -> str:
    stream = io.StringIO()
    Console(file=stream, width=width, force_terminal=is_terminal, highlight=False).print(draw(document))
    return stream.getvalue()


@pytest.mark.parametrize("name", SUMMARIES)
def test_a_summary_fits_80_columns_without_escapes_where_there_is_no_terminal(name: str) -> None:
    text = printed(SUMMARIES[name]())

    assert max(len(line) for line in text.splitlines()) <= 80
    assert "\x1b" not in text


@pytest.mark.parametrize("name", SUMMARIES)
def test_no_color_leaves_no_colour(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")

    text = printed(SUMMARIES[name](), is_terminal=True)

    assert "\x1b[3" not in text.replace("\x1b[3m", "")
    assert "\x1b[38" not in text


def test_a_run_says_how_many_outputs_were_checked() -> None:
    checked = replace(example_run(), output_check=OutputCheck(num_checked=512))
    words = " ".join(printed(run_summary(checked)).split())
    assert "outputs: 512 compared with the model's reference, none differs" in words
    assert "outputs:" not in printed(run_summary(example_run()))


def test_long_names_are_folded_and_never_cut() -> None:
    names = {"big": "a100-sxm4-80gb-in-rack-17-slot-3", "mid": "v100-pcie-32gb-in-rack-2-slot-1", "small": "t4-0"}
    plan = example_plan()
    plan = replace(
        plan,
        placement={names[name]: held for name, held in plan.placement.items()},
        nodes={names[name]: flow for name, flow in plan.nodes.items()},
        flows=tuple(
            replace(flow, src=names.get(flow.src, flow.src), dst=names.get(flow.dst, flow.dst)) for flow in plan.flows
        ),
    )

    text = printed(plan_summary(plan))

    assert max(len(line) for line in text.splitlines()) <= 80
    assert "…" not in text
    assert "400.0" in text


def test_the_bottleneck_is_marked_by_a_word() -> None:
    lines = printed(plan_summary(example_plan())).splitlines()

    assert [line.split()[0] for line in lines if line.endswith("bottleneck")] == ["mid"]


def test_the_run_shows_promise_and_result_and_what_was_not_shaped() -> None:
    run = example_run(speed=0.8)

    text = printed(run_summary(run))

    for word in ("bound", "expected", "measured", "TTFT", "TPOT", "BELOW EXPECTED", NOT_SHAPED):
        assert word in text
    assert number(run.total_tokens_per_s) in text
    assert "[356.2, 393.8]" in text


def test_a_simulated_run_says_so() -> None:
    text = printed(run_summary(replace(example_run(), simulated=True)))

    assert text.startswith("SIMULATED RUN")
    assert "simulated" in text.split("VERDICT")[1]


def test_a_large_plan_lists_its_most_used_links_and_counts_the_rest() -> None:
    placement = {f"n{i}": LayerRange(0, 16) for i in range(40)}
    plan = replace(
        example_plan(),
        placement=placement,
        nodes={name: NodeFlow(flow_tokens_per_s=1.0, capacity_tokens_per_s=2.0) for name in placement},
        flows=tuple(
            LinkFlow(src="coordinator", dst=name, flow_tokens_per_s=1.0, capacity_tokens_per_s=2.0)
            for name in placement
        ),
    )

    text = printed(plan_summary(plan))

    assert "and 16 more node flows" in text
    assert "and 28 more link flows" in text


@pytest.mark.parametrize(
    ("share", "bar"), [(0.0, "····"), (0.001, "█···"), (0.5, "██··"), (0.99, "███·"), (1.0, "████"), (7.0, "████")]
)
def test_a_bar_is_full_only_where_nothing_is_left(share: float, bar: str) -> None:
    assert share_bar(share, 4) == bar


def test_a_bar_of_few_layers_is_never_empty() -> None:
    assert layer_bar(LayerRange(79, 80), 80, 32) == "·" * 31 + "█"
    assert layer_bar(LayerRange(0, 80), 80, 32) == "█" * 32


def test_numbers_keep_their_digits() -> None:
    assert [number(v) for v in (0.0123, 9.876, 97.25, 375.0, 1234.4, 97000, 275_000, 999_999, 6.2e8)] == [
        "0.0123",
        "9.88",
        "97.2",
        "375.0",
        "1,234",
        "97,000",
        "275k",
        "1M",
        "620M",
    ]
    assert [seconds(v) for v in (1.234, 0.0981, 0.00012, 0.0)] == ["1.23 s", "98.1 ms", "120 us", "0 ms"]


def test_ascii_keeps_every_column() -> None:
    text = printed(run_summary(example_run()))

    plain = to_ascii(text)

    assert plain.isascii()
    assert [len(line) for line in plain.splitlines()] == [len(line) for line in text.splitlines()]
