from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec

from tests.reports.conftest import Command
from tests.reports.report_examples import example_plan

Save = Callable[[msgspec.Struct | bytes, str], Path]
replace = msgspec.structs.replace


def test_two_plans_are_gated_on_their_predictions(command: Command, save: Save, tmp_path: Path) -> None:
    plan = example_plan()
    worse = replace(plan, predicted=replace(plan.predicted, max_flow_tokens_per_s=300.0))
    base, same, new = save(plan, "base.json"), save(plan, "same.json"), save(worse, "new.json")

    assert command("gate", base, same).exit_code == 0
    failed = command("gate", base, new, "--junit", tmp_path / "j.xml")
    assert failed.exit_code == 1
    assert "FAILED  max_flow_tokens_per_s: 400.0 -> 300.0 (-25.00%)" in failed.stdout
    assert 'failures="1"' in (tmp_path / "j.xml").read_text()
    assert command("gate", base, new, "--min-effect", "0.3").exit_code == 0


def test_a_plan_that_is_missing_or_damaged_never_passes(command: Command, save: Save, tmp_path: Path) -> None:
    base = save(example_plan(), "base.json")

    assert command("gate", base, tmp_path / "none.json").exit_code == 3
    assert command("gate", base, save(b"", "empty.json")).exit_code == 3
    assert command("gate", base, save(b"{", "broken.json")).exit_code == 2


def test_a_prediction_that_the_new_plan_lacks_is_not_a_pass(command: Command, save: Save) -> None:
    plan = example_plan()
    fewer = replace(plan, predicted=replace(plan.predicted, expected=plan.predicted.expected[:1]))
    whole, less = save(plan, "whole.json"), save(fewer, "less.json")

    assert command("gate", whole, less).exit_code == 3
    assert command("gate", less, whole).exit_code == 0
