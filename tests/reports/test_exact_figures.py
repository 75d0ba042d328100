from __future__ import annotations

import msgspec
import pytest

from helixbench.records import load_record
from helixbench.reports.gate.cases import exit_code_of
from tests.reports.exact import Figure, Figures, exact_cases
from tests.reports.project_figures import BASELINE, milp_effort, project_figures
from tests.solver.clusters import random_cluster


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


def test_the_projects_own_figures_have_not_become_worse() -> None:
    """After an intended change ``python -m tests.reports.project_figures`` rewrites the baseline."""
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
