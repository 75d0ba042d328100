"""A run on a stale profile says so with its verdict; two profiles are compared by batches that both measured."""

from __future__ import annotations

import msgspec

from helixbench.profiler.cost.measured import CostSample
from helixbench.profiler.cost.model import BatchShape
from helixbench.reports.compare.compare import compare
from helixbench.reports.render.markdown import markdown
from helixbench.reports.render.summaries import run_summary
from helixbench.reports.verdict.validate import validate
from tests.reports.report_examples import example_profile, example_run


def test_a_stale_profile_is_part_of_the_verdict_and_of_the_summary() -> None:
    run = msgspec.structs.replace(example_run(), stale=("big: torch 2.10 -> 2.11",))
    assert validate(run).stale == ("big: torch 2.10 -> 2.11",)
    assert "stale profile: big: torch 2.10 -> 2.11" in markdown(run_summary(run))
    assert "stale" not in markdown(run_summary(example_run()))


def test_profiles_are_compared_by_common_batches() -> None:
    profile = example_profile()
    cost = profile.nodes[0].cost
    assert cost is not None
    samples = tuple(
        CostSample(
            num_layers=4,
            first=False,
            last=False,
            batch=BatchShape(decode_tokens=n, decode_context_tokens=16 * n, sampled_tokens=n),
            median_s=0.01 * n,
            spread=0.01,
            repeats=5,
            held_out=False,
        )
        for n in range(1, 9)
    )
    slower = tuple(msgspec.structs.replace(s, median_s=1.2 * s.median_s) for s in samples)
    base, new = (
        msgspec.structs.replace(
            profile,
            nodes=(
                msgspec.structs.replace(profile.nodes[0], cost=msgspec.structs.replace(cost, samples=taken)),
                *profile.nodes[1:],
            ),
        )
        for taken in (samples, slower)
    )
    found = {change.name: change for change in compare(base, new).changes}
    assert found["big: time of decode batches"].judgement == "worse"
    assert found["big: time of decode batches"].new == "1.200 over 8 batches"
