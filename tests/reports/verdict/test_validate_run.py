from __future__ import annotations

import msgspec
import pytest

from helixbench.reference_server.run_log import DifferingOutput, OutputCheck, RunLog, Window
from helixbench.reports.gate.cases import ExitCode, exit_code_of, run_cases
from helixbench.reports.verdict.validate import measured_interval, validate
from helixbench.reports.verdict.verdict import Band, Interval
from tests.reports.report_examples import CONCURRENCY, example_plan, example_run

replace = msgspec.structs.replace


@pytest.fixture(scope="module")
def run() -> RunLog:
    return example_run()


def test_an_honest_run_is_as_predicted(run: RunLog) -> None:
    verdict = validate(run)

    assert verdict.outcome == "as predicted"
    assert all(check.is_passed for check in verdict.checks), verdict.checks
    assert verdict.measured_tokens_per_s == (run.prompt_tokens + run.output_tokens) / 32.0
    assert verdict.ratio_to_expected == verdict.measured_tokens_per_s / 375.0
    assert verdict.ratio_to_bound == verdict.measured_tokens_per_s / 400.0
    assert verdict.expected_interval == Interval(375.0 * 0.95, 375.0 * 1.05)


def test_the_measured_interval_holds_the_measured_rate(run: RunLog) -> None:
    interval = measured_interval(run)

    assert interval is not None
    assert interval.low < run.total_tokens_per_s < interval.high
    assert interval.high - interval.low < 0.2 * run.total_tokens_per_s


def test_a_window_of_few_intervals_has_no_interval(run: RunLog) -> None:
    assert measured_interval(replace(run, window=Window(8.0, 11.0))) is None


def test_shares_of_nodes_and_links_are_held_against_the_plan(run: RunLog) -> None:
    verdict = validate(run)

    nodes = {node.name: node for node in verdict.nodes}
    assert nodes["small"].planned_share == pytest.approx(0.3)
    assert nodes["small"].realised_share == pytest.approx(0.3, abs=1e-3)
    assert nodes["mid"].predicted_iteration_s == pytest.approx(
        0.94 * 12.4 / (125.0 * 31 / 32)
    )  # a first token is not decoded
    assert [node.name for node in verdict.nodes] == ["small", "big", "mid"]
    for link in verdict.links:
        assert link.realised_share == pytest.approx(link.planned_share, abs=1e-3)


def test_a_link_that_was_not_planned_is_listed_with_no_planned_share(run: RunLog) -> None:
    stray = replace(run.links[2], src="big", dst="small")

    links = validate(replace(run, links=(*run.links, stray))).links

    assert links[-1].planned_share == 0.0
    assert links[-1].realised_share > 0.5


def test_a_concurrency_without_a_prediction_could_not_be_measured(run: RunLog) -> None:
    verdict = validate(replace(run, concurrency=CONCURRENCY + 1))

    assert verdict.outcome == "could not measure"
    assert verdict.expected_tokens_per_s is None
    assert "no prediction for concurrency 17" in verdict.statement
    assert "8, 16" in verdict.statement


def test_a_slower_iteration_at_the_planned_batch_blames_the_cost_model(run: RunLog) -> None:
    mid = run.nodes["mid"]
    slow = replace(
        mid, busy_s=32.0, iterations=round(mid.iterations * 0.8), decode_tokens=round(mid.decode_tokens * 0.8)
    )

    causes = validate(replace(run, nodes={**run.nodes, "mid": slow})).causes

    assert any("mid: iterations are" in cause and "slower" in cause for cause in causes)


@pytest.mark.parametrize(
    ("speed", "outcome", "exit_code"),
    [(1.0, "as predicted", 0), (0.7, "below expected", 1), (1.3, "above bound", 1)],
)
def test_the_gate_follows_the_ratio(speed: float, outcome: str, exit_code: int) -> None:
    verdict = validate(example_run(speed=speed))

    assert verdict.outcome == outcome
    assert exit_code_of(run_cases(verdict)) == exit_code


def test_above_expected_fails_although_it_is_below_the_bound(run: RunLog) -> None:
    verdict = validate(run, Band(max_ratio=0.9))

    assert verdict.outcome == "above expected"
    assert exit_code_of(run_cases(verdict)) == ExitCode.FAIL


def test_above_the_bound_fails_even_inside_a_wide_band() -> None:
    verdict = validate(example_run(speed=1.3), Band(max_ratio=9.0))

    assert exit_code_of(run_cases(verdict)) == ExitCode.FAIL
    assert "the cost model or a unit is wrong" in verdict.statement


def _without_window_requests(run: RunLog) -> RunLog:
    return replace(run, requests=tuple(r for r in run.requests if r.finish_s < run.window.start_s))


def _with_negative_tokens(run: RunLog) -> RunLog:
    return replace(run, nodes={**run.nodes, "mid": replace(run.nodes["mid"], decode_tokens=-5)})


def _with_nan_busy(run: RunLog) -> RunLog:
    return replace(run, nodes={**run.nodes, "mid": replace(run.nodes["mid"], busy_s=float("nan"))})


def _of_another_plan(run: RunLog) -> RunLog:
    other = replace(example_plan(), model="another")
    return replace(run, plan=other)


WRONG = tuple(DifferingOutput(request=r, first_token=t, pipeline=0) for r, t in ((4, 2), (6, 0)))

TAMPERED = {
    "no request finished inside the window": _without_window_requests,
    "decode_tokens is -5": _with_negative_tokens,
    "busy_s is nan": _with_nan_busy,
    "contains plan": _of_another_plan,
    "outputs: 2 of 9 differ from the model's reference (request 4 from token 2 on, request 6 from token 0 on)": (
        lambda run: replace(run, output_check=OutputCheck(num_checked=9, differing=WRONG))
    ),
    "cut short: agent mid died": lambda run: replace(run, cut_short="agent mid died"),
    "after the run itself": lambda run: replace(run, window=Window(8.0, 400.0)),
    "timeline is empty": lambda run: replace(run, timeline=()),
    "output tokens counted, but the requests": lambda run: replace(run, output_tokens=run.output_tokens * 3),
    "timeline adds up to": lambda run: replace(run, prompt_tokens=run.prompt_tokens + 900),
    "requests were in flight": lambda run: replace(run, requests=(*run.requests, run.requests[0])),
    "nodes that ran differ": lambda run: replace(run, nodes={"mid": run.nodes["mid"]}),
    "pipeline ends at layer 8": lambda run: replace(run, pipelines=((("small", 0, 8),), *run.pipelines)),
    "which is not in the plan": lambda run: replace(run, pipelines=((("mid", 0, 16),), *run.pipelines)),
    "was busy": lambda run: replace(run, nodes={**run.nodes, "mid": replace(run.nodes["mid"], busy_s=99.0)}),
}


@pytest.mark.parametrize("message", TAMPERED)
def test_a_tampered_run_never_passes(run: RunLog, message: str) -> None:
    verdict = validate(TAMPERED[message](run))

    assert exit_code_of(run_cases(verdict)) == ExitCode.NOT_MEASURED
    assert message in verdict.statement


def test_the_band_must_be_a_band() -> None:
    with pytest.raises(ValueError, match="min_ratio"):
        Band(min_ratio=1.2, max_ratio=1.1)


def test_the_verdict_survives_its_file(run: RunLog) -> None:
    verdict = validate(run)

    assert msgspec.json.decode(msgspec.json.encode(verdict), type=type(verdict)) == verdict


@pytest.mark.parametrize(("late", "outcome"), [(0, "as predicted"), (1, "as predicted"), (2, "unsound")])
def test_an_emulated_run_of_which_too_much_was_late_is_unsound(run: RunLog, late: int, outcome: str) -> None:
    nodes = dict(run.nodes)
    nodes["big"] = replace(nodes["big"], iterations=100, late_iterations=late)
    emulated = replace(run, emulated=("big",), time_scale=3.0, nodes=nodes)

    verdict = validate(emulated)

    assert verdict.outcome == outcome
    assert verdict.is_emulated
    if outcome == "unsound":
        assert "2.0% of the emulated iterations took longer here" in verdict.statement
        assert "raise `time_scale` in the testbed file, which was 3" in verdict.statement
        assert exit_code_of(run_cases(verdict)) is ExitCode.NOT_MEASURED
    else:
        assert "measured on emulated devices" in verdict.statement
