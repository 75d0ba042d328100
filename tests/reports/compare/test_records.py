from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from helixbench.errors import InputError
from helixbench.reports.compare.change import Change, Comparison
from helixbench.reports.compare.compare import compare
from helixbench.solver.problem.plan import LayerRange
from tests.reports.conftest import Command
from tests.reports.report_examples import example_plan, example_profile, example_run

Save = Callable[[msgspec.Struct | bytes, str], Path]
replace = msgspec.structs.replace


def changes(comparison: Comparison) -> dict[str, Change]:
    return {change.name: change for change in comparison.changes}


def test_a_run_compared_with_itself_has_not_changed() -> None:
    found = compare(example_run(), example_run())

    assert {change.judgement for change in found.changes} == {"unchanged"}


def test_another_seed_is_within_noise() -> None:
    found = changes(compare(example_run(seed=0), example_run(seed=1)))

    assert found["total_tokens_per_s"].judgement == "within noise"
    assert found["tpot_mean_s"].judgement == "within noise"


def test_a_slower_run_is_worse_in_every_direction() -> None:
    found = changes(compare(example_run(seed=0), example_run(seed=1, speed=0.7)))

    for name in ("total_tokens_per_s", "output_tokens_per_s", "ttft_mean_s", "tpot_mean_s"):
        assert found[name].judgement == "worse", name
        assert found[name].interval is not None
    assert found["outcome"].new == "below expected"
    assert found["ttft_p99_s"].judgement == "changed"


def test_runs_of_two_plans_say_so() -> None:
    other = replace(example_run(), plan=replace(example_plan(), model="another"), concurrency=8)

    notes = " ".join(compare(example_run(), other).notes)

    assert "different plans" in notes
    assert "concurrency differs: 16 and 8" in notes


def test_a_looser_bound_is_no_better_plan() -> None:
    plan = example_plan()
    looser = replace(plan, predicted=replace(plan.predicted, upper_bound_tokens_per_s=500.0))

    assert changes(compare(plan, looser))["upper_bound_tokens_per_s"].judgement == "changed"


def test_a_moved_node_is_named() -> None:
    plan = example_plan()
    moved = replace(plan, placement={**plan.placement, "small": LayerRange(0, 6)})

    found = changes(compare(plan, moved))

    assert (found["layers of small"].base, found["layers of small"].new) == ("[0,8)", "[0,6)")
    assert found["layers of big"].judgement == "unchanged"


def test_a_higher_bound_is_better_without_noise() -> None:
    plan = example_plan()
    higher = replace(plan, predicted=replace(plan.predicted, max_flow_tokens_per_s=410.0))

    assert changes(compare(plan, higher))["max_flow_tokens_per_s"].judgement == "better"


@pytest.mark.parametrize(("factor", "judgement"), [(1.05, "within noise"), (1.5, "worse"), (0.6, "better")])
def test_a_stage_time_counts_beyond_the_held_out_error(factor: float, judgement: str) -> None:
    profile = example_profile()
    cost = profile.nodes[0].cost
    assert cost is not None
    stage = replace(cost.stage, layer_s=cost.stage.layer_s * factor, step_s=cost.stage.step_s * factor)
    other = replace(profile, nodes=(replace(profile.nodes[0], cost=replace(cost, stage=stage)), *profile.nodes[1:]))

    found = changes(compare(profile, other))

    assert found["big: time of 8 decodes"].judgement == judgement
    assert found["mid: time of 8 decodes"].judgement == "unchanged"


def test_two_kinds_cannot_be_compared() -> None:
    with pytest.raises(InputError, match="different kinds"):
        compare(example_run(), example_plan())


def test_the_command_prints_and_writes(command: Command, save: Save, tmp_path: Path) -> None:
    base, new = save(example_run(), "a.json"), save(example_run(speed=0.7), "b.json")

    result = command("compare", base, new, "--markdown", tmp_path / "c.md", "--json")

    assert result.exit_code == 0
    assert msgspec.json.decode(result.stdout, type=Comparison).kind == "run"
    assert max(len(line) for line in result.stderr.splitlines() if str(tmp_path) not in line) <= 80
    assert "| **worse** | total tokens/s |" in (tmp_path / "c.md").read_text()


def test_the_command_refuses_two_kinds(command: Command, save: Save) -> None:
    result = command("compare", save(example_run(), "a.json"), save(example_plan(), "b.json"))

    assert result.exit_code == 2
    assert "different kinds" in result.stderr
