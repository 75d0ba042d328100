"""The commands of a suite, the files that they make, and fingerprints that tell whether a file is still valid."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import msgspec

from helixbench.reports.suite.child import Step
from helixbench.reports.suite.suite import KV_FULL, Suite, SuiteCase, SuiteTestbed
from helixbench.solver.problem.plan import Plan

ALLOW_STALE = "--allow-stale"
# A simulation covers this many times the requests of a run, for the sake of high percentiles.
_SIMULATED_WINDOWS = 5


class Commands(msgspec.Struct, frozen=True, kw_only=True):
    """The steps of one suite.

    ``out`` is the results folder, an absolute path. ``model`` is a hub id or a directory; ``None`` for the suite's own.
    """

    suite: Suite
    out: Path
    model: str | None
    allow_stale: bool = False

    def testbed_file(self, testbed: SuiteTestbed) -> Path:
        """The copy of the testbed's TOML."""
        return self.out / "testbeds" / testbed.name / "testbed.toml"

    def lengths_file(self, case: SuiteCase) -> Path:
        """The case's lengths, as a trace that ``solve --trace`` reads."""
        return self.out / "cases" / case.name / "lengths.csv"

    def make_model(self) -> Step:
        """Make the suite's own model."""
        model = self.out / "model"
        return Step(
            title="make the model",
            arguments=("model", "make", model, *self.suite.model.make_arguments),
            makes=model,
        )

    def profile(self, testbed: SuiteTestbed) -> Step:
        """Profile a testbed."""
        cluster, limits = self._cluster(testbed), self.suite.profile
        return Step(
            title=f"{testbed.name}: profile",
            arguments=(
                *("profile", *self._place(testbed), "-o", cluster),
                *("--budget-s", f"{limits.budget_s:g}", "--max-batch-tokens", str(limits.max_batch_tokens)),
                *("--max-context-tokens", str(limits.max_context_tokens)),
            ),
            makes=cluster,
        )

    def solve(self, case: SuiteCase) -> Step:
        """Plan a case; with full KV caches the plan determines the concurrency."""
        plan = self._plan(case)
        in_flight = () if case.concurrency == KV_FULL else ("--concurrency", str(case.concurrency))
        return Step(
            title=f"{case.name}: solve",
            arguments=(
                *("solve", self._cluster(case.testbed), *self._lengths(case), *in_flight),
                *("--time-limit-s", f"{self.suite.solve_time_limit_s:g}", "-o", plan),
            ),
            makes=plan,
        )

    def simulate(self, case: SuiteCase, plan: Plan) -> Step:
        """Simulate a plan, for the latency percentiles that the plan itself does not predict."""
        simulated = self.out / "cases" / case.name / "simulated.json"
        return Step(
            title=f"{case.name}: simulate",
            arguments=(
                *("simulate", self._plan(case), "--cluster", self._cluster(case.testbed)),
                *(*self._lengths(case), *_load(case, plan, windows=_SIMULATED_WINDOWS), "-o", simulated),
            ),
            makes=simulated,
        )

    def bench(self, case: SuiteCase, plan: Plan, repeat: int) -> Step:
        """Serve a plan under load; prompts and their order differ between repeats."""
        run = self.out / "cases" / case.name / f"run-{repeat}.json"
        return Step(
            title=f"{case.name}: serve and load, repeat {repeat}",
            arguments=(
                *("bench", self._plan(case), *self._place(case.testbed), *_load(case, plan)),
                *("--seed", str(repeat), "-o", run, *((ALLOW_STALE,) if self.allow_stale else ())),
            ),
            makes=run,
        )

    def fingerprint(self, step: Step) -> str:
        """A digest of a step's arguments and of the content of its input files.

        What a step makes need not be made again while this is the same. ``--allow-stale`` permits a run but does not
        change it, so it does not count.
        """
        parts = [self._identity(step, argument) for argument in step.arguments if argument != ALLOW_STALE]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def _identity(self, step: Step, argument: str | Path) -> str:
        if isinstance(argument, str):
            return argument
        if argument != step.makes and argument.is_file():
            return hashlib.sha256(argument.read_bytes()).hexdigest()
        return str(argument.relative_to(self.out) if argument.is_relative_to(self.out) else argument)

    def _cluster(self, testbed: SuiteTestbed) -> Path:
        return self.out / "testbeds" / testbed.name / "cluster.json"

    def _plan(self, case: SuiteCase) -> Path:
        return self.out / "cases" / case.name / "plan.json"

    def _place(self, testbed: SuiteTestbed) -> tuple[str | Path, ...]:
        return "--model", self.model or self.out / "model", "--testbed", testbed.file or self.testbed_file(testbed)

    def _lengths(self, case: SuiteCase) -> tuple[str | Path, ...]:
        lengths = case.workload.lengths
        if len(set(lengths)) > 1:
            return "--trace", self.lengths_file(case)
        return "--prompt-tokens", str(lengths[0][0]), "--output-tokens", str(lengths[0][1])


def in_flight_of(case: SuiteCase, plan: Plan) -> int:
    """Requests in flight; with full KV caches the last concurrency that the plan predicts for."""
    return plan.predicted.expected[-1].concurrency if isinstance(case.concurrency, str) else case.concurrency


def _load(case: SuiteCase, plan: Plan, *, windows: int = 1) -> tuple[str, ...]:
    """Concurrency and window. Requests are rounded up to whole rounds of all in flight.

    Requests of equal length run in waves, so a window with part of a round would count more prompts, or fewer, than
    belong to its output tokens.
    """
    in_flight = in_flight_of(case, plan)
    concurrency = ("--concurrency", str(in_flight))
    if case.requests is None:
        return (*concurrency, "--duration-s", f"{(case.duration_s or 0.0) * windows:g}")
    return (*concurrency, "--requests", str(math.ceil(case.requests / in_flight) * in_flight * windows))


def trace_of(case: SuiteCase) -> bytes:
    """The case's lengths as CSV."""
    lines = ["ContextTokens,GeneratedTokens", *(f"{prompt},{output}" for prompt, output in case.workload.lengths)]
    return ("\n".join(lines) + "\n").encode()
