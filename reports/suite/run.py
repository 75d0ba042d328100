"""Run a suite: every testbed profiled once, every case planned once, then the repeats of all cases in turn."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec

from helixbench.errors import InputError
from helixbench.profiler.cluster import ClusterProfile
from helixbench.records import load_record, provenance_now, save_bytes, save_record
from helixbench.reference_server.run_log import RunLog
from helixbench.reports import loading
from helixbench.reports.suite.child import INTERRUPTED, TERMINATED, Step, run_child
from helixbench.reports.suite.judge import judge_case
from helixbench.reports.suite.progress import Progress
from helixbench.reports.suite.result import CaseResult, SuiteResult, Tolerance
from helixbench.reports.suite.steps import Layout, Steps, lengths_csv
from helixbench.reports.suite.suite import Suite, SuiteCase, SuiteTestbed
from helixbench.reports.verdict.validate import validate
from helixbench.reports.verdict.verdict import Band, Verdict
from helixbench.solver.problem.plan import Plan

_TAIL = 300


class SuiteOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What the user asked for beside the suite. ``model`` replaces the suite's own; ``allow_stale`` as of ``bench``."""

    out: Path
    repeats: int
    tolerance: Tolerance
    resume: bool = False
    model: str | None = None
    allow_stale: bool = False


class _StoppedError(Exception):
    """The user ended the suite."""


def run_suite(suite: Suite, options: SuiteOptions, *, run: Callable[..., int] | None = None) -> SuiteResult:
    """Measure what is not there yet and judge all of it; ``suite.json`` is written after every repeat.

    A step that fails leaves its cases (or its repeat) unmeasured, with the reason, and the others go on. After Ctrl-C
    or SIGTERM the result says so and holds what there is.

    Args:
        suite: the cases.
        options: how often, where to, and what counts as ok.
        run: runs a command line as ``run_child`` does, which it is where not given.

    Raises:
        InputError: a testbed asks for more than this machine has, or the folder holds results and is not to be resumed.
    """
    return _SuiteRun(suite, options, run or run_child).result()


class _SuiteRun:
    def __init__(self, suite: Suite, options: SuiteOptions, run: Callable[..., int]) -> None:
        self._suite, self._options, self._run = suite, options, run
        self._layout = Layout(options.out.resolve())
        model = options.model or suite.model.path or str(self._layout.model)
        self._steps = Steps(suite=suite, layout=self._layout, model=model, allow_stale=options.allow_stale)
        self._plans: dict[str, Plan] = {}  # case -> its plan
        self._simulated: dict[str, RunLog] = {}  # case -> its plan on a virtual clock
        self._verdicts: dict[str, list[Verdict]] = {case.name: [] for case in suite.cases}
        self._failures: dict[str, list[str]] = {case.name: [] for case in suite.cases}
        self._begun: set[tuple[str, int]] = set()  # case, repeat
        self._bed_of: dict[str, str] = {}  # testbed -> how it was run
        self._band = Band(min_ratio=options.tolerance.min_ratio, max_ratio=options.tolerance.max_ratio)
        self._is_interrupted = False
        cases = len(suite.cases)
        self._progress = Progress(
            {
                "model": int(self._steps.make_model() is not None),
                "profile": len(suite.testbeds),
                "solve": cases,
                "simulate": cases,
                "bench": cases * options.repeats,
            }
        )

    def result(self) -> SuiteResult:
        if self._layout.result.exists() and not self._options.resume:
            raise InputError(
                f"-o {self._options.out}: holds the results of a suite; go on with --resume, or choose another folder"
            )
        try:
            with self._progress:
                self._prepare()
                for repeat in range(1, self._options.repeats + 1):
                    for case in self._suite.cases:
                        self._repeat(case, repeat)
        except (_StoppedError, KeyboardInterrupt):
            self._is_interrupted = True
            self._add_kept()
        return self._judge()

    def _prepare(self) -> None:
        """The model, the profiles and the plans; a case without one of them has a reason in ``_failures``."""
        model_problem = self._make_model()
        clusters: dict[str, ClusterProfile] = {}
        for testbed in self._suite.testbeds:
            problem = model_problem or self._profile(testbed, clusters)
            for case in self._suite.cases:
                if problem and case.testbed.name == testbed.name:
                    self._failures[case.name].append(problem)
        for case in self._suite.cases:
            if case.testbed.name in clusters:
                self._plan(case, clusters[case.testbed.name])
            else:
                self._progress.skip("solve")
        for case in self._suite.cases:
            if case.name in self._plans:
                self._simulate(case, self._plans[case.name])
            else:
                self._progress.skip("simulate")

    def _make_model(self) -> str:
        step = self._steps.make_model()
        if step is None:
            return ""
        if Path(step.makes).exists() and self._options.resume:
            self._progress.skip("model", step.title)
            return ""
        return self._do(step)

    def _profile(self, testbed: SuiteTestbed, clusters: dict[str, ClusterProfile]) -> str:
        step = self._steps.profile(testbed)
        cluster = self._steps.kept_cluster(testbed) if self._options.resume else None
        if cluster is None:
            self._layout.cluster(testbed).unlink(missing_ok=True)
            save_bytes(self._layout.testbed(testbed), testbed.text.encode())
            if problem := self._do(step):
                return problem
            cluster = load_record(self._layout.cluster(testbed), ClusterProfile)
        else:
            self._progress.skip("profile", step.title)
        clusters[testbed.name] = cluster
        self._bed_of[testbed.name] = cluster.testbed
        return ""

    def _plan(self, case: SuiteCase, cluster: ClusterProfile) -> None:
        step = self._steps.solve(case)
        plan = self._steps.kept_plan(case, cluster) if self._options.resume else None
        if plan is None:
            self._layout.plan(case).unlink(missing_ok=True)
            save_bytes(self._layout.lengths(case), lengths_csv(case.workload))
            if problem := self._do(step):
                self._failures[case.name].append(problem)
                return
            plan = load_record(self._layout.plan(case), Plan)
        else:
            self._progress.skip("solve", step.title)
        self._plans[case.name] = plan

    def _simulate(self, case: SuiteCase, plan: Plan) -> None:
        step = self._steps.simulate(case, plan)
        kept = self._steps.kept_simulation(case, plan) if self._options.resume else None
        if kept is None:
            self._layout.simulated(case).unlink(missing_ok=True)
            if problem := self._do(step):
                self._failures[case.name].append(problem)
                return
            kept = loading.load_run(self._layout.simulated(case))
        else:
            self._progress.skip("simulate", step.title)
        self._simulated[case.name] = kept

    def _repeat(self, case: SuiteCase, repeat: int) -> None:
        plan = self._plans.get(case.name)
        if plan is None:
            self._progress.skip("bench")
            return
        self._begun.add((case.name, repeat))
        step = self._steps.bench(case, plan, repeat)
        title = f"{step.title}, repeat {repeat} of {self._options.repeats}"
        log = self._steps.kept_run(case, plan, repeat) if self._options.resume else None
        if log is None:
            path = self._layout.run(case, repeat)
            path.unlink(missing_ok=True)
            try:
                problem = self._do(msgspec.structs.replace(step, title=title))
            finally:
                self._note_run(case, path)
            if problem:
                self._failures[case.name].append(problem)
        else:
            self._verdicts[case.name].append(validate(log, self._band))
            self._progress.skip("bench", title)
        self._judge()

    def _add_kept(self) -> None:
        """Runs of an earlier time that were not come to: they count in the table of what there is."""
        if not self._options.resume:
            return
        for case in self._suite.cases:
            cluster = self._steps.kept_cluster(case.testbed)
            plan = cluster and self._steps.kept_plan(case, cluster)
            if plan and (simulated := self._steps.kept_simulation(case, plan)):
                self._simulated.setdefault(case.name, simulated)
            for repeat in range(1, self._options.repeats + 1):
                if (
                    (case.name, repeat) not in self._begun
                    and plan
                    and (log := self._steps.kept_run(case, plan, repeat))
                ):
                    self._plans[case.name] = plan
                    self._verdicts[case.name].append(validate(log, self._band))

    def _note_run(self, case: SuiteCase, path: Path) -> None:
        if path.exists():
            verdict = validate(loading.load_run(path), self._band)
            self._verdicts[case.name].append(verdict)
            self._progress.say(verdict.statement)

    def _do(self, step: Step) -> str:
        """Run a step; why it failed, or nothing. What it prints goes to a file beside what it makes."""
        log = self._log_of(step)
        log.parent.mkdir(parents=True, exist_ok=True)
        with self._progress.step(step.arguments[0], step.title), log.open("ab") as output:
            began_at = output.tell()
            output.write(f"$ helixbench {' '.join(step.arguments)}\n".encode())
            output.flush()
            exit_code = self._run(step.arguments, stdout=output, stderr=output)
        if exit_code in (INTERRUPTED, TERMINATED):
            raise _StoppedError
        if exit_code == 0 and Path(step.makes).exists():
            return ""
        said = log.read_bytes()[began_at:].decode(errors="replace").strip().splitlines()[-1][-_TAIL:]
        problem = f"{step.title}: exit {exit_code}: {said}"
        self._progress.say(f"{problem} (all of it is in {log})")
        return problem

    def _log_of(self, step: Step) -> Path:
        made = Path(step.makes)
        return made.parent / "model.log" if made == self._layout.model else made.with_suffix(".log")

    def _judge(self) -> SuiteResult:
        result = SuiteResult(
            suite=self._suite.name,
            tolerance=self._options.tolerance,
            repeats=self._options.repeats,
            is_interrupted=self._is_interrupted,
            cases=tuple(self._case_result(case) for case in self._suite.cases),
            testbeds=dict(self._bed_of),
            provenance=provenance_now(),
        )
        save_record(self._layout.result, result)
        return result

    def _case_result(self, case: SuiteCase) -> CaseResult:
        plan = self._plans.get(case.name)
        in_flight = case.concurrency if isinstance(case.concurrency, int) else None
        if plan is not None and in_flight is None:
            in_flight = plan.predicted.expected[-1].concurrency
        return judge_case(
            case.name,
            self._verdicts[case.name],
            testbed=case.testbed.name,
            workload=case.workload.source,
            concurrency=in_flight,
            repeats=self._options.repeats,
            tolerance=self._options.tolerance,
            failures=self._failures[case.name],
            simulated=self._simulated.get(case.name),
        )
