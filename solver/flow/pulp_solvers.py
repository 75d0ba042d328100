"""Any solver that PuLP knows, by name: status, incumbent and bound as the solver itself says them.

HiGHS is called directly (``placement.milp``), for it tells of its progress and takes a start; this is for all others.
"""

from __future__ import annotations

import re
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helixbench.errors import InputError

HIGHS = "HiGHS"

INTERFACES = ("", "_CMD", "_PY", "_DLL")
"""Endings of PuLP's names for its ways to one solver, in the order in which they are tried."""

ALIASES = {"CBC": ("PULP_CBC_CMD", "COIN_CMD"), "GLPK": ("GLPK_CMD", "PYGLPK"), "HIGHS": (HIGHS,)}
"""Names in use -> PuLP's names."""

_CBC_BOUND = re.compile(r"^(?:Upper|Lower) bound:\s+(\S+)", re.MULTILINE)

BOUNDS: dict[str, Callable[[Any], float]] = {
    "GUROBI": lambda model: float(model.ObjBound),
    "CPLEX_PY": lambda model: float(model.solution.MIP.get_best_objective()),
    "SCIP_PY": lambda model: float(model.getDualbound()),
    "XPRESS_PY": lambda model: float(model.attributes.bestbound),
}
"""PuLP's name -> the bound that the solver's own model, ``problem.solverModel``, has proven."""

TAKES_START = {"PULP_CBC_CMD", "COIN_CMD", "GUROBI", "GUROBI_CMD", "CPLEX_PY", "CPLEX_CMD", "XPRESS_PY", "COPT"}
"""Those that start from values of some variables."""


@dataclass(frozen=True)
class Solved:
    """What a solver says of a problem to maximise. Without a proof of its own ``bound`` is infinite."""

    has_solution: bool
    is_optimal: bool
    is_infeasible: bool
    value: float
    bound: float


def find_solver(name: str) -> str:
    """PuLP's name of the solver that is meant, for one that can be used here.

    Raises:
        InputError: PuLP knows no such solver, or it is not installed.
    """
    import pulp

    known: dict[str, str] = {one.upper(): one for one in pulp.listSolvers()}
    wanted = name.upper()
    names = ALIASES.get(wanted, tuple(known[wanted + end] for end in INTERFACES if wanted + end in known))
    if not names:
        raise InputError(f"--solver {name}: PuLP knows no such solver; it knows {', '.join(sorted(known.values()))}")
    for one in names:
        try:
            if _make(one).available():
                return one
        except (ImportError, OSError, pulp.PulpSolverError):
            continue
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        usable = ", ".join(pulp.listSolvers(onlyAvailable=True)) or "none"
    raise InputError(f"--solver {name}: not installed, or without a licence; usable here: {usable}")


def solve_with(
    problem: Any, name: str, *, time_s: float, threads: int, relative_gap: float, start: Mapping[Any, float]
) -> Solved:
    """Solve a problem to maximise by the solver with that name of PuLP's; values are then in its variables.

    Args:
        problem: of PuLP.
        name: see ``find_solver``.
        time_s: it ends by then with the best so far.
        threads: at most, where the solver has such an option.
        relative_gap: at which a solution counts as optimal.
        start: variable -> value to start from, for solvers that take one.

    Raises:
        InputError: the solver failed.
    """
    import pulp

    for variable, value in start.items():
        variable.setInitialValue(value, check=False)
    options: dict[str, Any] = {"timeLimit": time_s, "gapRel": relative_gap, "threads": threads}
    if start and name in TAKES_START:
        options["warmStart"] = True
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        if name in ALIASES["CBC"]:
            options["logPath"] = str(log)
        try:
            problem.solve(_with_known_options(name, options))
        except (pulp.PulpSolverError, OSError) as error:
            raise InputError(f"--solver {name}: the solver failed: {error}") from error
        text = log.read_text(errors="replace") if log.is_file() else ""
    has_solution = problem.sol_status in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible)
    is_optimal = problem.sol_status == pulp.LpSolutionOptimal
    value = float(pulp.value(problem.objective) or 0.0) if has_solution else 0.0
    bound = value * (1 + relative_gap) if is_optimal else float("inf")
    if name in BOUNDS:
        bound = min(bound, BOUNDS[name](problem.solverModel))
    elif found := _CBC_BOUND.search(text):
        bound = min(bound, float(found[1]))
    is_infeasible = problem.status == pulp.LpStatusInfeasible
    return Solved(has_solution, is_optimal, is_infeasible, value, max(bound, value))


def _with_known_options(name: str, options: dict[str, Any]) -> Any:
    """The solver, without the options that it does not have."""
    left = dict(options)
    while True:
        try:
            return _make(name, **left)
        except TypeError as error:
            unknown = next((option for option in left if option in str(error)), None)
            if unknown is None:
                raise
            del left[unknown]


def _make(name: str, **options: Any) -> Any:
    """PuLP's object for a solver, without its advice to its own users on future names."""
    import pulp

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return pulp.getSolver(name, msg=False, **options)
