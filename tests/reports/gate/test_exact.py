from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from helixbench.records import load_record
from helixbench.reports.gate.exact import Figure, Figures, exact_cases, exit_code_of
from tests.reports.conftest import Command
from tests.reports.project_figures import BASELINE, milp_effort, project_figures
from tests.reports.report_examples import example_plan
from tests.solver.clusters import random_cluster

Save = Callable[[msgspec.Struct | bytes, str], Path]


def figures(**values: float) -> Figures:
    return Figures(
        figures={name: Figure(value=value, better="higher", tolerance=0.01) for name, value in values.items()}
    )


@pytest.mark.parametrize(
    ("better", "new", "exit_code"),
    [
        ("higher", 101.0, 0),
        ("higher", 99.5, 0),
        ("higher", 98.0, 1),
        ("lower", 98.0, 0),
        ("lower", 102.0, 1),
        ("equal", 100.5, 0),
        ("equal", 102.0, 1),
        ("equal", 98.0, 1),
    ],
)
def test_a_figure_follows_its_direction_and_tolerance(better: str, new: float, exit_code: int) -> None:
    base = Figures(figures={"x": Figure(value=100.0, better=better, tolerance=0.01)})  # type: ignore[arg-type]
    loose = Figures(figures={"x": Figure(value=new, better="higher", tolerance=0.9)})

    assert exit_code_of(exact_cases(base, loose)) == exit_code


def test_a_figure_that_has_gone_is_not_a_pass_and_a_new_one_is_no_failure() -> None:
    assert exit_code_of(exact_cases(figures(a=1.0, b=1.0), figures(a=1.0))) == 3
    assert exit_code_of(exact_cases(figures(a=1.0), figures(a=1.0, b=1.0))) == 0


def test_two_plans_are_gated_on_what_they_promise(command: Command, save: Save, tmp_path: Path) -> None:
    plan = example_plan()
    worse = msgspec.structs.replace(
        plan, predicted=msgspec.structs.replace(plan.predicted, max_flow_tokens_per_s=300.0)
    )
    base, same, new = save(plan, "base.json"), save(plan, "same.json"), save(worse, "new.json")

    assert command("gate", base, same).exit_code == 0
    failed = command("gate", base, new, "--junit", tmp_path / "j.xml")
    assert failed.exit_code == 1
    assert "FAILED  max_flow_tokens_per_s: 400.0 became 300.0 (-25.00%)" in failed.stdout
    assert 'failures="1"' in (tmp_path / "j.xml").read_text()
    assert command("gate", base, new, "--min-effect", "0.3").exit_code == 0


def test_a_plan_that_is_missing_or_damaged_never_passes(command: Command, save: Save, tmp_path: Path) -> None:
    base = save(example_plan(), "base.json")

    assert command("gate", base, tmp_path / "none.json").exit_code == 3
    assert command("gate", base, save(b"", "empty.json")).exit_code == 3
    assert command("gate", base, save(b"{", "broken.json")).exit_code == 2


def test_the_projects_own_figures_have_not_become_worse() -> None:
    """After a change that is meant: ``python -m tests.reports.project_figures`` writes the baseline anew."""
    cases = exact_cases(load_record(BASELINE, Figures), project_figures())

    assert exit_code_of(cases) == 0, [case for case in cases if case.status != "passed"]


def test_the_solvers_effort_is_the_same_each_time() -> None:
    assert milp_effort(random_cluster(0), is_linked=True) == milp_effort(random_cluster(0), is_linked=True)


def test_twice_the_solver_nodes_fail_the_gate() -> None:
    base = load_record(BASELINE, Figures)
    names = [name for name in base.figures if name.startswith("nodes of HiGHS")]
    worse = {n: msgspec.structs.replace(base.figures[n], value=2 * base.figures[n].value) for n in names}

    assert len(names) == 2
    assert exit_code_of(exact_cases(base, Figures(figures=base.figures | worse))) == 1
