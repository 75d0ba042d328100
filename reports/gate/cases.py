"""Gate answers as test cases: the source of the exit code, JUnit, annotations and Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from enum import IntEnum, StrEnum

import msgspec

from helixbench.reports.compare.regression import Answer, Regression
from helixbench.reports.formatting import number
from helixbench.reports.verdict.validate import PREDICTED_ARRIVALS
from helixbench.reports.verdict.verdict import Outcome, Verdict
from helixbench.solver.problem.plan import Plan


class ExitCode(IntEnum):
    """Exit codes of gates; 2 is invalid input."""

    PASS = 0
    FAIL = 1
    NOT_MEASURED = 3
    UNDECIDED = 4


class Status(StrEnum):
    """Result of a case, the worst first. ``ERROR``: not measured. ``UNDECIDED``: hidden by noise."""

    FAILED = "failed"
    ERROR = "error"
    UNDECIDED = "undecided"
    PASSED = "passed"


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that was checked."""

    suite: str
    name: str
    status: Status
    message: str
    details: tuple[str, ...] = ()


class GateRecord(msgspec.Struct, frozen=True, kw_only=True, tag_field="schema", tag="helixbench.gate/1"):
    """The cases of a gate as a record."""

    cases: tuple[Case, ...]


_ANSWER_STATUS = {
    Answer.FASTER: Status.PASSED,
    Answer.SAME: Status.PASSED,
    Answer.SLOWER: Status.FAILED,
    Answer.INCONCLUSIVE: Status.UNDECIDED,
    Answer.NO_DATA: Status.ERROR,
}


def worst_first(cases: Sequence[Case]) -> list[Case]:
    """In the order of ``Status``, otherwise as given."""
    order = list(Status)
    return sorted(cases, key=lambda case: order.index(case.status))


def exit_code_of(cases: Sequence[Case], *, is_strict: bool = False) -> ExitCode:
    """The worst case decides; undecided cases pass unless ``is_strict``."""
    statuses = {case.status for case in cases}
    if Status.FAILED in statuses:
        return ExitCode.FAIL
    if Status.ERROR in statuses:
        return ExitCode.NOT_MEASURED
    return ExitCode.UNDECIDED if is_strict and Status.UNDECIDED in statuses else ExitCode.PASS


def run_cases(verdict: Verdict) -> tuple[Case, ...]:
    """The run against its plan, and every consistency check of its record."""
    status = {
        Outcome.AS_PREDICTED: Status.PASSED,
        Outcome.NOT_MEASURED: Status.ERROR,
        Outcome.UNSOUND: Status.ERROR,
    }
    prediction = Case(
        suite="prediction",
        name=f"{'simulated' if verdict.is_simulated else 'measured'} / expected {_load_of(verdict)}",
        status=status.get(verdict.outcome, Status.FAILED),
        message=verdict.statement,
        details=tuple(filter(None, (*verdict.causes, verdict.testbed, *verdict.stale, *verdict.notes))),
    )
    checks = (
        Case(
            suite="integrity",
            name=check.name,
            status=Status.PASSED if check.is_passed else Status.ERROR,
            message=check.message,
        )
        for check in verdict.checks
    )
    return (prediction, *_latency_cases(verdict), *_client_cases(verdict, status), *checks)


def _client_cases(verdict: Verdict, status: Mapping[Outcome, Status]) -> Iterator[Case]:
    if (client := verdict.client) is not None:
        yield Case(
            suite="client",
            name=f"{client.result.client} / expected {_load_of(verdict)}",
            status=status.get(client.outcome, Status.FAILED),
            message=client.statement,
        )


def _load_of(verdict: Verdict) -> str:
    if verdict.arrivals in PREDICTED_ARRIVALS:
        return f"at concurrency {verdict.concurrency}"
    return f"with arrivals: {verdict.arrivals}"


def _latency_cases(verdict: Verdict) -> Iterator[Case]:
    """Each percentile of latency that is promised and settled by the requests."""
    most = verdict.band.max_latency_ratio
    for latency in verdict.latencies:
        for percent, ratio in latency.ratios.items():
            yield Case(
                suite="latency",
                name=f"{latency.kind.upper()} p{percent} measured / promised",
                status=Status.PASSED if ratio <= most else Status.FAILED,
                message=f"{ratio:.3f}; at most {most:g}",
            )


def regression_cases(regression: Regression) -> tuple[Case, ...]:
    """The one question of a regression gate."""
    pairs = (f"pair {i}: base {pair.base:.6g}, new {pair.new:.6g}" for i, pair in enumerate(regression.pairs, start=1))
    fresh = (f"confirmation: base {pair.base:.6g}, new {pair.new:.6g}" for pair in regression.confirmation)
    case = Case(
        suite="regression",
        name=regression.question.metric,
        status=_ANSWER_STATUS[regression.answer],
        message=regression.statement,
        details=(*regression.notes, *pairs, *fresh),
    )
    return (case,)


def plan_cases(base: Plan, new: Plan, *, tolerance: float) -> tuple[Case, ...]:
    """Predictions of a new plan against those of a base plan.

    They are computed, so one of each decides: NEW may be lower by a share ``tolerance``. A prediction that only NEW has
    passes; one that NEW lacks could not be compared.
    """
    before, after = dict(_predictions(base)), dict(_predictions(new))
    return tuple(
        _plan_case(name, before.get(name), after.get(name), tolerance) for name in dict.fromkeys((*before, *after))
    )


def _predictions(plan: Plan) -> Iterator[tuple[str, float]]:
    yield "max_flow_tokens_per_s", plan.predicted.max_flow_tokens_per_s
    for entry in plan.predicted.expected:
        yield f"expected_tokens_per_s at concurrency {entry.concurrency}", entry.total_tokens_per_s


def _plan_case(name: str, base: float | None, new: float | None, tolerance: float) -> Case:
    if base is None:
        status, message = Status.PASSED, f"{number(new)}, not in the base plan"
    elif new is None:
        status, message = Status.ERROR, f"was {number(base)}, is missing now"
    else:
        status = Status.FAILED if new < base * (1 - tolerance) else Status.PASSED
        change = f" ({new / base - 1:+.2%})" if base else ""
        message = f"{number(base)} -> {number(new)}{change}; tolerance {tolerance:.2g}"
    return Case(suite="plan", name=name, status=status, message=message)
