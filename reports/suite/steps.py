"""The commands of a suite and the files that they make, and which of those files still hold. Nothing is run here."""

from __future__ import annotations

import csv
import io
import math
import shlex
from pathlib import Path
from typing import TypeVar

import msgspec

from helixbench.errors import InputError
from helixbench.profiler.cluster import ClusterProfile
from helixbench.records import digest, load_record
from helixbench.reference_server.run_log import RunLog
from helixbench.reports.suite.child import Step
from helixbench.reports.suite.suite import KV_FULL, Suite, SuiteCase, SuiteTestbed
from helixbench.solver.problem.plan import Plan
from helixbench.solver.problem.workload import Workload

RecordT = TypeVar("RecordT", bound=msgspec.Struct)
ALLOW_STALE = "--allow-stale"
_SIMULATED_WINDOWS = 5  # so many times a run's requests are simulated, for the sake of high percentiles


class Layout(msgspec.Struct, frozen=True):
    """Where what lies below the folder of results, an absolute path."""

    out: Path

    @property
    def result(self) -> Path:
        """What came out."""
        return self.out / "suite.json"

    @property
    def model(self) -> Path:
        """The model that was made for the suite."""
        return self.out / "model"

    def testbed(self, testbed: SuiteTestbed) -> Path:
        """A copy of the testbed's file as it was profiled."""
        return self.out / "testbeds" / testbed.name / "testbed.toml"

    def cluster(self, testbed: SuiteTestbed) -> Path:
        """The testbed's profile."""
        return self.out / "testbeds" / testbed.name / "cluster.json"

    def case(self, case: SuiteCase) -> Path:
        """The folder of a case."""
        return self.out / "cases" / case.name

    def plan(self, case: SuiteCase) -> Path:
        """Its plan."""
        return self.case(case) / "plan.json"

    def simulated(self, case: SuiteCase) -> Path:
        """The run log of its plan on a virtual clock."""
        return self.case(case) / "simulated.json"

    def lengths(self, case: SuiteCase) -> Path:
        """Its lengths, where they are not all alike."""
        return self.case(case) / "lengths.csv"

    def run(self, case: SuiteCase, repeat: int) -> Path:
        """The run log of one repeat, counted from 1."""
        return self.case(case) / f"run-{repeat}.json"


class Steps(msgspec.Struct, frozen=True, kw_only=True):
    """Makes the command lines of one suite. ``model`` is a directory or hub id.

    A record keeps the command that made it, so paths below the working directory are relative to it.
    """

    suite: Suite
    layout: Layout
    model: str
    allow_stale: bool = False

    def make_model(self) -> Step | None:
        """The step that makes the suite's own model; ``None`` where another one is served."""
        if self.model != str(self.layout.model):
            return None
        choice = self.suite.model
        return Step(
            title="make the model",
            arguments=("model", "make", self._model, "--preset", choice.preset, "--seed", str(choice.seed)),
            makes=self.model,
        )

    def profile(self, testbed: SuiteTestbed) -> Step:
        """The step that measures a testbed."""
        cluster, limits = self.layout.cluster(testbed), self.suite.profile
        return Step(
            title=f"{testbed.name}: profile",
            arguments=(
                *("profile", *self._place(testbed), "-o", _shown(cluster)),
                *("--budget-s", f"{limits.budget_s:g}", "--max-batch-tokens", str(limits.max_batch_tokens)),
                *("--max-context-tokens", str(limits.max_context_tokens)),
            ),
            makes=str(cluster),
        )

    def solve(self, case: SuiteCase) -> Step:
        """The step that plans a case; with KV caches full, the plan says how many requests that is."""
        plan = self.layout.plan(case)
        in_flight = () if case.concurrency == KV_FULL else ("--concurrency", str(case.concurrency))
        return Step(
            title=f"{case.name}: solve",
            arguments=(
                *("solve", _shown(self.layout.cluster(case.testbed)), *self._lengths(case), *in_flight),
                *("--time-limit-s", f"{self.suite.solve_time_limit_s:g}", "-o", _shown(plan)),
            ),
            makes=str(plan),
        )

    def simulate(self, case: SuiteCase, plan: Plan) -> Step:
        """The step that predicts a plan's latencies beyond their mean."""
        simulated = self.layout.simulated(case)
        in_flight = _in_flight(case, plan)
        load = ("--concurrency", str(in_flight), *_window(case, in_flight, times=_SIMULATED_WINDOWS))
        return Step(
            title=f"{case.name}: simulate",
            arguments=(
                *("simulate", _shown(self.layout.plan(case)), "--cluster", _shown(self.layout.cluster(case.testbed))),
                *(*self._lengths(case), *load, "-o", _shown(simulated)),
            ),
            makes=str(simulated),
        )

    def bench(self, case: SuiteCase, plan: Plan, repeat: int) -> Step:
        """The step that serves a plan once; prompts and their order differ from repeat to repeat."""
        run = self.layout.run(case, repeat)
        in_flight = _in_flight(case, plan)
        load = ("--concurrency", str(in_flight), *_window(case, in_flight))
        return Step(
            title=f"{case.name}: serve and load",
            arguments=(
                *("bench", _shown(self.layout.plan(case)), *self._place(case.testbed), *load),
                *("--seed", str(repeat), "-o", _shown(run), *((ALLOW_STALE,) if self.allow_stale else ())),
            ),
            makes=str(run),
        )

    def _place(self, testbed: SuiteTestbed) -> tuple[str, ...]:
        file = testbed.file or self.layout.testbed(testbed)
        return "--model", self._model, "--testbed", _shown(file)

    @property
    def _model(self) -> str:
        return _shown(self.layout.model) if self.model == str(self.layout.model) else self.model

    def _lengths(self, case: SuiteCase) -> tuple[str, ...]:
        lengths = case.workload.lengths
        if len(set(lengths)) > 1:
            return "--trace", _shown(self.layout.lengths(case))
        return "--prompt-tokens", str(lengths[0][0]), "--output-tokens", str(lengths[0][1])

    def kept_cluster(self, testbed: SuiteTestbed) -> ClusterProfile | None:
        """The profile that lies there, where this testbed and these options would make it again."""
        file = self.layout.testbed(testbed)
        cluster = _load(self.layout.cluster(testbed), ClusterProfile)
        if cluster is None or not file.is_file() or file.read_text(encoding="utf-8") != testbed.text:
            return None
        return cluster if _is_made_by(cluster.provenance.command, self.profile(testbed)) else None

    def kept_plan(self, case: SuiteCase, cluster: ClusterProfile) -> Plan | None:
        """The plan that lies there, where it is of this profile, these lengths and these options."""
        plan = _load(self.layout.plan(case), Plan)
        if (
            plan is None
            or plan.cluster_digest != digest(cluster)
            or not _is_made_by(plan.provenance.command, self.solve(case))
        ):
            return None
        return plan if plan.assumptions.workload.lengths == case.workload.lengths else None

    def kept_simulation(self, case: SuiteCase, plan: Plan) -> RunLog | None:
        """The simulated run that lies there, where it is a whole one of this plan and as many requests in flight.

        Over how many requests it was does not count: that makes it more exact, not another one.
        """
        run = _load(self.layout.simulated(case), RunLog)
        if run is None or run.cut_short or digest(run.plan) != digest(plan):
            return None
        return run if run.concurrency == _in_flight(case, plan) else None

    def kept_run(self, case: SuiteCase, plan: Plan, repeat: int) -> RunLog | None:
        """The run that lies there, where it is a whole one of this plan and these options, and not stale."""
        run = _load(self.layout.run(case, repeat), RunLog)
        if run is None or run.cut_short or digest(run.plan) != digest(plan) or (run.stale and not self.allow_stale):
            return None
        return run if _is_made_by(run.provenance.command, self.bench(case, plan, repeat)) else None


def _in_flight(case: SuiteCase, plan: Plan) -> int:
    return plan.predicted.expected[-1].concurrency if isinstance(case.concurrency, str) else case.concurrency


def _window(case: SuiteCase, in_flight: int, *, times: int = 1) -> tuple[str, str]:
    """Whole rounds of all in flight: with a part of one, equal lengths make it a window of more prompts or fewer."""
    if case.requests is None:
        return "--duration-s", f"{(case.duration_s or 0.0) * times:g}"
    return "--requests", str(math.ceil(case.requests / in_flight) * in_flight * times)


def lengths_csv(workload: Workload) -> bytes:
    """The lengths as a trace that ``solve --trace`` reads."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("ContextTokens", "GeneratedTokens"))
    writer.writerows(workload.lengths)
    return text.getvalue().encode()


def _load(path: Path, kind: type[RecordT]) -> RecordT | None:
    try:
        return load_record(path, kind)
    except InputError:
        return None  # missing, damaged or of an older schema: it is made again


def _is_made_by(command: str, step: Step) -> bool:
    """Whether these are the step's arguments, as they may have been given in another working directory."""
    made, wanted = ([one for one in line if one != ALLOW_STALE] for line in (shlex.split(command)[1:], step.arguments))
    return len(made) == len(wanted) and all(map(_is_same, made, wanted))


def _is_same(made: str, wanted: str) -> bool:
    """Equal, or paths one of which ends in the other; that a file is another one, its digest in the records says."""
    shorter, longer = sorted((Path(made).parts, Path(wanted).parts), key=len)
    return made == wanted or bool(shorter and longer[-len(shorter) :] == shorter)


def _shown(path: Path) -> str:
    path, here = path.resolve(), Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)
