"""Run a suite: profile every testbed and plan every case once, then run the repeats of all cases in turn."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import msgspec

from helixbench.errors import InputError
from helixbench.profiler.cluster import ClusterProfile
from helixbench.progress import StepReporter
from helixbench.records import load_record, provenance_now, save_bytes, save_record
from helixbench.reference_server.run_log import RunLog
from helixbench.reports.suite.child import INTERRUPTED, TERMINATED, Step, run_child
from helixbench.reports.suite.commands import Commands, in_flight_of, trace_of
from helixbench.reports.suite.judge import judge_case
from helixbench.reports.suite.result import CaseOutcome, CaseResult, SuiteResult, Tolerance
from helixbench.reports.suite.suite import Suite, SuiteCase, SuiteTestbed
from helixbench.reports.verdict.validate import validate
from helixbench.reports.verdict.verdict import Verdict
from helixbench.solver.problem.plan import Plan

RecordT = TypeVar("RecordT", ClusterProfile, Plan, RunLog)
_TAIL = 300


class SuiteOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Options of ``validate``. ``model`` replaces the suite's own; ``allow_stale`` is that of ``bench``."""

    out: Path
    repeats: int
    tolerance: Tolerance
    resume: bool = False
    model: str | None = None
    allow_stale: bool = False


class Fingerprints(msgspec.Struct, kw_only=True, tag_field="schema", tag="helixbench.fingerprints/1"):
    """File, relative to the results folder -> fingerprint of the step that made it."""

    files: dict[str, str] = {}


class _StoppedError(Exception):
    """The user interrupted the suite."""


class _StepFailedError(Exception):
    """A step failed, so what follows from it cannot run."""


def run_suite(suite: Suite, options: SuiteOptions, *, run: Callable[..., int] | None = None) -> SuiteResult:
    """Measure and judge all cases; ``suite.json`` is written after every repeat.

    A failed step leaves its cases, or its repeat, unmeasured with the reason, and the others go on. After Ctrl-C or
    SIGTERM the result contains what there is and says so.

    Args:
        suite: the cases.
        options: repeats, results folder and tolerance.
        run: runs a command line as ``run_child`` does, which is the default.

    Raises:
        InputError: the folder has results and is not to be resumed.
    """
    return _SuiteRun(suite, options, run or run_child).result()


class _SuiteRun:
    def __init__(self, suite: Suite, options: SuiteOptions, run: Callable[..., int]) -> None:
        self._suite, self._options, self._run = suite, options, run
        self._out = options.out.resolve()
        model = options.model or suite.model.path
        self._commands = Commands(suite=suite, out=self._out, model=model, allow_stale=options.allow_stale)
        self._made_by = _load_fingerprints(self._out / "fingerprints.json")
        self._plans: dict[str, Plan] = {}  # case -> its plan
        self._simulated: dict[str, RunLog] = {}  # case -> its simulated plan
        self._verdicts: dict[str, list[Verdict]] = {case.name: [] for case in suite.cases}
        self._failures: dict[str, list[str]] = {case.name: [] for case in suite.cases}
        self._bed_of: dict[str, str] = {}  # testbed -> how it was run
        self._is_interrupted = False
        cases = len(suite.cases)
        steps = {"profile": len(suite.testbeds), "solve": cases, "simulate": cases, "bench": cases * options.repeats}
        self._progress = StepReporter({"model": int(model is None), **steps})

    def result(self) -> SuiteResult:
        if (self._out / "suite.json").exists() and not self._options.resume:
            raise InputError(f"-o {self._options.out}: contains results; add --resume, or choose another folder")
        with self._progress:
            try:
                self._prepare()
                for repeat in range(1, self._options.repeats + 1):
                    for case in self._suite.cases:
                        self._repeat(case, repeat)
            except (_StoppedError, KeyboardInterrupt):
                self._is_interrupted = True
                self._add_kept_runs()
        return self._judge()

    def _prepare(self) -> None:
        """Model, profiles, plans and simulations. A case that lacks one of them has the reason in ``_failures``."""
        problems: dict[str, str] = {}  # testbed -> why it has no profile
        model_problem = self._problem_in(self._make_model)
        for testbed in self._suite.testbeds:
            problems[testbed.name] = model_problem or self._problem_in(self._profile, testbed)
        for case in self._suite.cases:
            problem = problems[case.testbed.name]
            if problem:
                self._progress.skip("solve")
            problem = problem or self._problem_in(self._plan, case)
            if problem:
                self._progress.skip("simulate")
            problem = problem or self._problem_in(self._simulate, case)
            if problem:
                self._failures[case.name].append(problem)

    @staticmethod
    def _problem_in(action: Callable[..., None], *arguments: SuiteTestbed | SuiteCase) -> str:
        """Why a step of the action failed; empty if none did."""
        try:
            action(*arguments)
        except _StepFailedError as error:
            return str(error)
        return ""

    def _make_model(self) -> None:
        if self._commands.model is None:
            step = self._commands.make_model()
            if self._is_kept(step):
                self._progress.keep("model", step.title)
            else:
                self._do(step)

    def _profile(self, testbed: SuiteTestbed) -> None:
        save_bytes(self._commands.testbed_file(testbed), testbed.text.encode())
        self._bed_of[testbed.name] = self._make(self._commands.profile(testbed), ClusterProfile).testbed

    def _plan(self, case: SuiteCase) -> None:
        save_bytes(self._commands.lengths_file(case), trace_of(case))
        self._plans[case.name] = self._make(self._commands.solve(case), Plan)

    def _simulate(self, case: SuiteCase) -> None:
        self._simulated[case.name] = self._make(self._commands.simulate(case, self._plans[case.name]), RunLog)

    def _repeat(self, case: SuiteCase, repeat: int) -> None:
        plan = self._plans.get(case.name)
        if plan is None:
            self._progress.skip("bench")
            return
        step = self._commands.bench(case, plan, repeat)
        try:
            self._verdicts[case.name].append(self._verdict(self._make(step, RunLog)))
        except (_StepFailedError, _StoppedError) as error:
            with contextlib.suppress(InputError):  # a run that was cut short may have left its log
                self._verdicts[case.name].append(self._verdict(load_record(step.makes, RunLog)))
            if isinstance(error, _StoppedError):
                raise
            self._failures[case.name].append(str(error))
        self._judge()

    def _verdict(self, run: RunLog) -> Verdict:
        return validate(run, self._options.tolerance.band)

    def _add_kept_runs(self) -> None:
        """After an interrupt, count the runs of an earlier start that were not reached."""
        for case in self._suite.cases:
            if (plan := self._kept(self._commands.solve(case), Plan)) is None:
                continue
            self._plans[case.name] = plan
            if simulated := self._kept(self._commands.simulate(case, plan), RunLog):
                self._simulated[case.name] = simulated
            known = {verdict.run_digest for verdict in self._verdicts[case.name]}
            for repeat in range(1, self._options.repeats + 1):
                run = self._kept(self._commands.bench(case, plan, repeat), RunLog)
                if run is not None and (verdict := self._verdict(run)).run_digest not in known:
                    self._verdicts[case.name].append(verdict)

    def _make(self, step: Step, kind: type[RecordT]) -> RecordT:
        """The record that a step makes: kept from an earlier start, or made now."""
        if (kept := self._kept(step, kind)) is not None:
            self._progress.keep(str(step.arguments[0]), step.title)
            return kept
        step.makes.unlink(missing_ok=True)
        self._do(step)
        record = load_record(step.makes, kind)
        if isinstance(record, RunLog):
            self._progress.say(f"    {self._verdict(record).statement}")
        return record

    def _kept(self, step: Step, kind: type[RecordT]) -> RecordT | None:
        """The record of an earlier start, if the same step would make it again; never a run cut short, or stale."""
        if not self._is_kept(step):
            return None
        try:
            record = load_record(step.makes, kind)
        except InputError:
            return None  # damaged, or of an older schema: make it again
        if isinstance(record, RunLog) and (record.cut_short or (record.stale and not self._options.allow_stale)):
            return None
        return record

    def _is_kept(self, step: Step) -> bool:
        made_by = self._made_by.files.get(self._name_of(step))
        return self._options.resume and step.makes.exists() and made_by == self._commands.fingerprint(step)

    def _name_of(self, step: Step) -> str:
        return str(step.makes.relative_to(self._out))

    def _do(self, step: Step) -> None:
        """Run a step; its output goes to a log file beside what it makes.

        Raises:
            _StepFailedError: it failed.
            _StoppedError: the user interrupted it.
        """
        log = step.makes.with_suffix(".log")
        log.parent.mkdir(parents=True, exist_ok=True)
        fingerprint = self._commands.fingerprint(step)
        with self._progress.step(str(step.arguments[0]), step.title), log.open("ab") as output:
            began_at = output.tell()
            output.write(f"$ helixbench {' '.join(step.command)}\n".encode())
            output.flush()
            exit_code = self._run(step.command, stdout=output, stderr=output)
        if exit_code in (INTERRUPTED, TERMINATED):
            raise _StoppedError
        if exit_code != 0 or not step.makes.exists():
            last = log.read_bytes()[began_at:].decode(errors="replace").strip().splitlines()[-1][-_TAIL:]
            problem = f"{step.title}: exit {exit_code}: {last}"
            self._progress.say(f"    {problem} (full output: {log})")
            raise _StepFailedError(problem)
        self._made_by.files[self._name_of(step)] = fingerprint
        save_record(self._out / "fingerprints.json", self._made_by)

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
        save_record(self._out / "suite.json", result)
        return result

    def _case_result(self, case: SuiteCase) -> CaseResult:
        plan = self._plans.get(case.name)
        in_flight = case.concurrency if isinstance(case.concurrency, int) else None
        unmeasured = CaseResult(
            name=case.name,
            testbed=case.testbed.name,
            workload=case.workload.source,
            concurrency=in_flight if plan is None else in_flight_of(case, plan),
            outcome=CaseOutcome.NOT_MEASURED,
            statement="",
            asked_repeats=self._options.repeats,
            num_repeats=0,
        )
        return judge_case(
            unmeasured,
            self._verdicts[case.name],
            tolerance=self._options.tolerance,
            failures=self._failures[case.name],
            simulated=self._simulated.get(case.name),
        )


def _load_fingerprints(path: Path) -> Fingerprints:
    try:
        return load_record(path, Fingerprints)
    except InputError:
        return Fingerprints()  # missing or damaged: everything is made again
