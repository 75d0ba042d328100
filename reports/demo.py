"""The demo: the program's own commands in sequence on one machine, and a report of the result."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from helixbench.options import note, print_record
from helixbench.records import save_bytes, save_record
from helixbench.reference_server.run_log import RunLog
from helixbench.reports.gate.cases import ExitCode
from helixbench.reports.loading import load_output
from helixbench.reports.output import show
from helixbench.reports.render.html import html_page
from helixbench.reports.render.summaries import run_summary
from helixbench.reports.suite.child import INTERRUPTED, Step, run_child
from helixbench.reports.verdict.validate import validate

PROMPT_TOKENS, OUTPUT_TOKENS, CONCURRENCY = 64, 32, 24
# Requests of equal length finish in waves; a window of whole rounds counts each prompt once, wherever it begins.
NUM_REQUESTS = 6 * CONCURRENCY
# Shorter than the defaults: the demo takes minutes.
PROFILE_S = 60
SOLVE_S = 20


class DemoConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Options of ``demo``; ``None`` stands for the demo's own model or testbed."""

    model: str | None
    testbed: Path | None
    out: Path
    is_json: bool


def run_demo(config: DemoConfig) -> int:
    """Run every step. A step that fails ends the demo with its exit code; finished files are kept."""
    began_s = time.perf_counter()
    steps = demo_steps(config)
    for i, step in enumerate(steps, start=1):
        exit_code = _run_step(step, f"[{i}/{len(steps) + 1}] {step.title}", is_json=config.is_json)
        if exit_code != 0:
            _report_kept(config, steps[: i - 1], exit_code, stopped_in=step.title)
            return exit_code
    note(f"[{len(steps) + 1}/{len(steps) + 1}] Report: compare measured with predicted performance")
    return _report(config, elapsed_s=time.perf_counter() - began_s)


def demo_steps(config: DemoConfig) -> tuple[Step, ...]:
    """The commands of the demo, in order."""
    cluster, plan, run = (config.out / name for name in ("cluster.json", "plan.json", "run.json"))
    model = config.model or config.out / "model"
    load = ("--prompt-tokens", str(PROMPT_TOKENS), "--output-tokens", str(OUTPUT_TOKENS))
    place = ("--model", model, *(() if config.testbed is None else ("--testbed", config.testbed)))
    concurrency = ("--concurrency", str(CONCURRENCY))
    make = Step(
        title="Model: make a small Hugging Face model",
        arguments=("model", "make", model, "--preset", "tiny", "--seed", "0"),
        makes=config.out / "model",
    )
    return (
        *([make] if config.model is None else []),
        Step(
            title="Profile: measure every node and link",
            arguments=("profile", *place, "--budget-s", str(PROFILE_S), "-o", cluster),
            makes=cluster,
        ),
        Step(
            title="Solve: place the layers",
            arguments=("solve", cluster, *load, *concurrency, "--time-limit-s", str(SOLVE_S), "-o", plan),
            makes=plan,
        ),
        Step(
            title="Serve: run the plan under load",
            arguments=("bench", plan, *place, *concurrency, "--requests", str(NUM_REQUESTS), *load, "-o", run),
            makes=run,
        ),
    )


def _run_step(step: Step, heading: str, *, is_json: bool) -> int:
    """Run a step in a process of its own; with ``--json`` its output goes to stderr."""
    note(f"{heading}\n    helixbench {' '.join(step.command)}")
    began_s = time.perf_counter()
    exit_code = run_child(step.command, stdout=sys.stderr if is_json else None, stderr=None)
    note(f"    {'done' if exit_code == 0 else f'exit {exit_code}'} after {time.perf_counter() - began_s:.1f} s\n")
    return exit_code


def _report(config: DemoConfig, *, elapsed_s: float) -> int:
    out = config.out
    run = load_output(out / "run.json", RunLog)
    verdict = validate(run)
    save_record(out / "verdict.json", verdict)
    save_bytes(out / "report.html", html_page(run).encode())
    show(run_summary(run, verdict), to_stderr=config.is_json)
    note(f"\n{elapsed_s:.0f} s in all; all files are in {out}/: open {out / 'report.html'}")
    if config.is_json:
        print_record(verdict)
    return ExitCode.PASS if verdict.outcome.is_comparison else ExitCode.NOT_MEASURED


def _report_kept(config: DemoConfig, done: Sequence[Step], exit_code: int, *, stopped_in: str) -> None:
    kept = ", ".join(step.makes.name for step in done if step.makes.exists()) or "nothing"
    word = "interrupted" if exit_code == INTERRUPTED else "stopped"
    note(f"helixbench: {word} in {stopped_in!r}; kept in {config.out}/: {kept}")
