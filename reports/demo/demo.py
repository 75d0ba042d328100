"""The demo: the program's own commands in sequence on one machine, and a report of the result."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from helixbench.options import note, print_record
from helixbench.records import provenance_now, save_bytes, save_record
from helixbench.reference_server.run_log import RunLog
from helixbench.reports.demo.comparison import DemoResult, Served, comparison
from helixbench.reports.demo.settings import Setting
from helixbench.reports.gate.cases import ExitCode
from helixbench.reports.loading import load_output
from helixbench.reports.output import show
from helixbench.reports.render.html import html_page
from helixbench.reports.render.summaries import run_summary
from helixbench.reports.suite.child import INTERRUPTED, TERMINATED, Step, run_child
from helixbench.reports.verdict.validate import validate

PLAN = "auto"  # the method of `solve` that is not a baseline
_INFEASIBLE = 1  # exit code of `solve` where a method finds no placement


class DemoConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Options of ``demo``; without a ``model`` the setting's own is made."""

    setting: Setting
    model: str | None
    out: Path
    is_json: bool


def run_demo(config: DemoConfig) -> int:
    """Run every step. A step that fails ends the demo with its exit code; finished files are kept.

    A baseline that has no placement on this cluster is left out.
    """
    began_s = time.perf_counter()
    steps = demo_steps(config)
    missing: set[str] = set()
    for i, step in enumerate(steps, start=1):
        if step.method in missing:
            continue
        exit_code = _run_step(step.step, f"[{i}/{len(steps) + 1}] {step.step.title}", is_json=config.is_json)
        if exit_code == _INFEASIBLE and step.method not in (None, PLAN):
            missing.add(step.method or "")
        elif exit_code != 0:
            _report_kept(config, [done.step for done in steps[: i - 1]], exit_code, stopped_in=step.step.title)
            return exit_code
    note(f"[{len(steps) + 1}/{len(steps) + 1}] Report: compare measured with predicted performance")
    methods = [method for method in config.setting.baselines if method not in missing]
    return _report(config, methods, elapsed_s=time.perf_counter() - began_s)


class DemoStep(msgspec.Struct, frozen=True):
    """A step, and the method of ``solve`` whose plan it makes or serves."""

    step: Step
    method: str | None = None


def demo_steps(config: DemoConfig) -> tuple[DemoStep, ...]:
    """The commands of the demo, in order."""
    setting, cluster = config.setting, config.out / "cluster.json"
    model = config.model or config.out / "model"
    place = ("--model", model, "--testbed", setting.testbed)
    budget = () if setting.profile_s is None else ("--budget-s", str(setting.profile_s))
    make = Step(
        title=f"Model: {setting.model_title}",
        arguments=("model", "make", model, *setting.model_arguments),
        makes=config.out / "model",
    )
    profile = Step(
        title="Profile: every node and link",
        arguments=("profile", *place, *budget, "-o", cluster),
        makes=cluster,
    )
    served = [step for method in (PLAN, *setting.baselines) for step in _served(config, method, place)]
    return (*([] if config.model else [DemoStep(make)]), DemoStep(profile), *served)


def _served(config: DemoConfig, method: str, place: tuple[str | Path, ...]) -> tuple[DemoStep, ...]:
    """Make the plan of a method, simulate the load, and serve it."""
    setting = config.setting
    plan, simulated, run = (_file(config, method, kind) for kind in ("plan", "simulated", "run"))
    how = ("--time-limit-s", str(setting.solve_s)) if method == PLAN else ("--method", method)
    solve = Step(
        title="Solve: place the layers" if method == PLAN else f"Baseline: the placement of {method}",
        arguments=("solve", config.out / "cluster.json", *setting.load_arguments, *how, "-o", plan),
        makes=plan,
    )
    name = "the plan" if method == PLAN else method
    load = (*setting.load_arguments, "--requests", str(setting.num_requests))
    simulate = Step(
        title=f"Simulate: {name} under load, on a virtual clock",
        arguments=("simulate", plan, "--cluster", config.out / "cluster.json", *load, "-o", simulated),
        makes=simulated,
    )
    # A baseline is served as it stands: a plan in its place would be no baseline.
    adapts = () if method == PLAN else ("--no-replan",)
    bench = Step(
        title=f"Serve: run {name} under load",
        arguments=("bench", plan, *place, *load, *setting.bench_arguments, *adapts, "-o", run),
        makes=run,
    )
    return tuple(DemoStep(step, method) for step in (solve, simulate, bench))


def _file(config: DemoConfig, method: str, kind: str) -> Path:
    return config.out / (f"{kind}.json" if method == PLAN else f"{method}-{kind}.json")


def _run_step(step: Step, heading: str, *, is_json: bool) -> int:
    """Run a step in a process of its own; with ``--json`` its output goes to stderr."""
    note(f"{heading}\n    helixbench {' '.join(step.command)}")
    began_s = time.perf_counter()
    exit_code = run_child(step.command, stdout=sys.stderr if is_json else None, stderr=None)
    note(f"    {'done' if exit_code == 0 else f'exit {exit_code}'} after {time.perf_counter() - began_s:.1f} s\n")
    return exit_code


def _report(config: DemoConfig, baselines: Sequence[str], *, elapsed_s: float) -> int:
    out = config.out
    run = _run(config, PLAN)
    verdict = validate(run)
    plan, *others = (
        Served.of(method, run=_run(config, method), simulated=_run(config, method, "simulated"))
        for method in (PLAN, *baselines)
    )
    result = DemoResult(plan=plan, baselines=tuple(others), verdict=verdict, provenance=provenance_now())
    save_record(out / "demo.json", result)
    save_bytes(out / "report.html", html_page(run).encode())
    show(run_summary(run, verdict), to_stderr=config.is_json)
    show(comparison(result), to_stderr=config.is_json)
    note(f"\n{elapsed_s:.0f} s in all; all files are in {out}/: open {out / 'report.html'}")
    if run.emulated:
        note("These devices are emulated. This machine's own: helixbench demo --real")
    if config.is_json:
        print_record(result)
    return ExitCode.PASS if verdict.outcome.is_comparison else ExitCode.NOT_MEASURED


def _run(config: DemoConfig, method: str, kind: str = "run") -> RunLog:
    return load_output(_file(config, method, kind), RunLog)


def _report_kept(config: DemoConfig, done: Sequence[Step], exit_code: int, *, stopped_in: str) -> None:
    kept = ", ".join(step.makes.name for step in done if step.makes.exists()) or "nothing"
    word = "interrupted" if exit_code in (INTERRUPTED, TERMINATED) else "stopped"
    note(f"helixbench: {word} in {stopped_in!r}; kept in {config.out}/: {kept}")
