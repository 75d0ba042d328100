from __future__ import annotations

import statistics
from collections.abc import Sequence

import pytest
from msgspec.structs import replace

from helixbench.reports.suite.judge import exit_code_of, judge_case, judge_ratios
from helixbench.reports.suite.result import CaseOutcome, CaseResult, Tolerance
from helixbench.reports.verdict.validate import validate
from helixbench.reports.verdict.verdict import Verdict
from tests.reports.report_examples import CONCURRENCY, example_run

SPEEDS = (0.98, 0.99, 1.0, 1.01, 1.02)


def judged(verdicts: Sequence[Verdict], *, repeats: int = 5, failures: Sequence[str] = ()) -> CaseResult:
    case = CaseResult(
        name="case",
        testbed="two",
        workload="fixed",
        concurrency=CONCURRENCY,
        outcome=CaseOutcome.NOT_MEASURED,
        statement="",
        asked_repeats=repeats,
        num_repeats=0,
    )
    return judge_case(case, verdicts, tolerance=Tolerance(), failures=failures)


def verdicts_at(ratios: Sequence[float], tpots: Sequence[float]) -> list[Verdict]:
    """Verdicts whose total tokens/s and TPOT p50 are those times what was expected."""
    verdict = validate(example_run())
    expected = verdict.expected_tokens_per_s or 0.0
    return [
        replace(
            verdict,
            ratio_to_expected=ratio,
            measured_tokens_per_s=ratio * expected,
            latencies=tuple(
                replace(latency, p50_s=tpot * (latency.predicted_mean_s or 0.0)) if latency.kind == "tpot" else latency
                for latency in verdict.latencies
            ),
        )
        for ratio, tpot in zip(ratios, tpots, strict=True)
    ]


@pytest.mark.parametrize(
    ("ratios", "outcome"),
    [
        ((0.95, 1.0, 1.05), "ok"),
        ((0.90, 0.96, 0.97), "ok"),  # the median counts, one outlier within the tolerance's width does not
        ((0.90, 0.94, 0.99), "off"),
        ((1.06, 1.07, 1.10), "off"),
        ((0.90, 1.0, 1.01), "inconclusive"),  # 0.11 apart, the tolerance is 0.10 wide
        ((0.50, 0.70, 0.94), "off"),  # far apart, but none of them within
        ((1.0,), "inconclusive"),
        ((), "not measured"),
    ],
)
def test_the_median_decides_unless_repeats_spread_wider_than_the_tolerance(
    ratios: tuple[float, ...], outcome: str
) -> None:
    assert judge_ratios(ratios, low=0.95, high=1.05) == outcome
    assert judge_ratios(ratios[::-1], low=0.95, high=1.05) == outcome


def test_a_case_says_medians_and_intervals_over_its_repeats() -> None:
    runs = [example_run(seed=seed, speed=speed) for seed, speed in enumerate(SPEEDS)]
    case = judged([validate(run) for run in runs])

    totals = [run.total_tokens_per_s for run in runs]
    assert case.measured_tokens_per_s == statistics.median(totals)
    assert case.ratio == pytest.approx(statistics.median(totals) / 375.0)
    assert case.spread == pytest.approx((max(totals) - min(totals)) / 375.0)
    assert case.measured_interval is not None
    assert case.measured_interval.low < statistics.fmean(totals) < case.measured_interval.high
    assert case.tpot_ratio == pytest.approx(
        statistics.median((run.latency_percentiles("tpot", (50.0,)) or (0.0,))[0] / 0.1 for run in runs)
    )
    assert [node.name for node in case.nodes] == ["small", "big", "mid"]
    assert [latency.kind for latency in case.latencies] == ["ttft", "tpot"]


def test_a_nodes_residual_is_the_median_of_the_repeats() -> None:
    run = example_run()
    use = run.nodes["big"]
    uses = [replace(use, busy_s=factor * use.busy_s) for factor in (1.5, 1.25, 1.2)]

    case = judged([validate(replace(run, nodes={**run.nodes, "big": slow})) for slow in uses])

    big = next(node for node in case.nodes if node.name == "big")
    assert any("big: iterations are 2" in cause and "slower than profiled" in cause for cause in case.causes)
    assert big.measured_busy == pytest.approx(1.25 * (big.predicted_busy or 0.0))
    assert big.measured_batch_tokens == pytest.approx(big.predicted_batch_tokens, rel=0.01)
    assert big.measured_iteration_s == pytest.approx(1.25 * use.busy_s / use.iterations)


@pytest.mark.parametrize(
    ("ratios", "tpots", "outcome"),
    [
        ((1.0,) * 5, (1.0,) * 5, "ok"),
        ((1.0,) * 5, (1.12,) * 5, "off"),
        ((1.0,) * 5, (0.9, 1.0, 1.0, 1.0, 1.15), "inconclusive"),
        ((0.8,) * 5, (0.9, 1.0, 1.0, 1.0, 1.15), "off"),
        ((0.9, 0.9, 1.0, 1.1, 1.1), (1.0,) * 5, "inconclusive"),
    ],
)
def test_throughput_and_tpot_both_have_to_hold(
    ratios: tuple[float, ...], tpots: tuple[float, ...], outcome: str
) -> None:
    assert judged(verdicts_at(ratios, tpots)).outcome == outcome


def test_above_the_bound_is_off_even_where_more_was_expected() -> None:
    low_bound = [
        replace(v, bound_tokens_per_s=(v.measured_tokens_per_s or 0.0) / 1.1) for v in verdicts_at((1.0,) * 3, (1,) * 3)
    ]

    case = judged(low_bound, repeats=3)

    assert case.outcome == "off"
    assert case.statement.startswith("above the bound (1.100 x)")


def test_a_run_that_was_cut_short_is_no_repeat() -> None:
    cut = validate(replace(example_run(), cut_short="interrupted"))

    some = judged([validate(example_run()), cut, validate(example_run())], repeats=3)
    none = judged([cut], repeats=3, failures=["repeat 2: exit 3"])

    assert (some.num_repeats, some.outcome) == (2, "ok")
    assert "2 of 3 repeats" in some.statement
    assert some.reasons == ("the run was cut short: interrupted",)
    assert (none.num_repeats, none.outcome, none.ratio) == (0, "not measured", None)
    assert none.reasons == ("repeat 2: exit 3", "the run was cut short: interrupted")


def test_exit_codes() -> None:
    ok = judged(verdicts_at((1.0,) * 5, (1.0,) * 5))
    off = judged(verdicts_at((0.8,) * 5, (1.0,) * 5))
    wide = judged(verdicts_at((0.9, 0.9, 1.0, 1.1, 1.1), (1.0,) * 5))
    missing = judged(verdicts_at((1.0,) * 4, (1.0,) * 4))

    assert exit_code_of([ok, ok], is_strict=True) == 0
    assert exit_code_of([ok, off, missing, wide], is_strict=True) == 1
    assert exit_code_of([ok, missing, wide], is_strict=True) == 3
    assert exit_code_of([ok, wide], is_strict=True) == 4
    assert exit_code_of([ok, wide], is_strict=False) == 0


@pytest.mark.parametrize("wrong", [{"tpot": 0.0}, {"tpot": 1.0}])
def test_a_tolerance_that_nothing_or_everything_keeps_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="need"):
        Tolerance(**wrong)
