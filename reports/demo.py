"""The demo: the program's own commands, one after the other, on one machine, and the report of what came out."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import typer

from helixbench.records import save_bytes, save_record
from helixbench.reports import loading
from helixbench.reports.gate.gate import COULD_NOT_MEASURE, exit_code_of
from helixbench.reports.options import print_record, show
from helixbench.reports.render.html import html_page
from helixbench.reports.render.terminal import run_summary
from helixbench.reports.suite.child import INTERRUPTED, Step, run_child
from helixbench.reports.verdict.validate import validate

PROMPT_TOKENS, OUTPUT_TOKENS, CONCURRENCY = 64, 32, 24
# Equal lengths make requests end in waves; a window of whole waves counts each prompt once, wherever it begins.
NUM_REQUESTS = 6 * CONCURRENCY
PROFILE_S = 60  # less than usual: the demo is to take minutes
SOLVE_S = 20


class DemoConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What the user asked for; ``None`` is the demo's own model or testbed."""

    model: str | None
    testbed: Path | None
    out: Path
    is_json: bool


def run_demo(config: DemoConfig) -> int:
    """Run every step, stop at the first that fails with its exit code; files that are finished stay."""
    began_s = time.perf_counter()
    steps = plan_steps(config)
    for i, step in enumerate(steps, start=1):
        exit_code = _run_step(step, f"[{i}/{len(steps) + 1}] {step.title}", is_json=config.is_json)
        if exit_code != 0:
            _say_what_is_kept(config, steps[: i - 1], exit_code, stopped_in=step.title)
            return exit_code
    _say(f"[{len(steps) + 1}/{len(steps) + 1}] Report: measured against predicted")
    return _report(config, elapsed_s=time.perf_counter() - began_s)


def plan_steps(config: DemoConfig) -> tuple[Step, ...]:
    """The commands of the chain, in order. They are kept in the records: no path in them that the user did not give."""
    out = config.out
    model = config.model or str(out / "model")
    load = ("--prompt-tokens", str(PROMPT_TOKENS), "--output-tokens", str(OUTPUT_TOKENS))
    place = ("--model", model, *(() if config.testbed is None else ("--testbed", str(config.testbed))))
    cluster, plan, run = (str(out / name) for name in ("cluster.json", "plan.json", "run.json"))
    concurrency = ("--concurrency", str(CONCURRENCY))
    make = Step(
        title="Model: make a small Hugging Face model",
        arguments=("model", "make", model, "--preset", "tiny", "--seed", "0"),
        makes="model",
    )
    return (
        *([make] if config.model is None else []),
        Step(
            title="Profile: measure every node and link",
            arguments=("profile", *place, "--budget-s", str(PROFILE_S), "-o", cluster),
            makes="cluster.json",
        ),
        Step(
            title="Solve: place the layers",
            arguments=("solve", cluster, *load, *concurrency, "--time-limit-s", str(SOLVE_S), "-o", plan),
            makes="plan.json",
        ),
        Step(
            title="Serve and load: run the plan",
            arguments=("bench", plan, *place, *concurrency, "--requests", str(NUM_REQUESTS), *load, "-o", run),
            makes="run.json",
        ),
    )


def _run_step(step: Step, heading: str, *, is_json: bool) -> int:
    """The step as a process of this program; with ``--json`` what it prints goes to stderr."""
    _say(f"{heading}\n    helixbench {' '.join(step.arguments)}")
    began_s = time.perf_counter()
    exit_code = run_child(step.arguments, stdout=sys.stderr if is_json else None, stderr=None)
    _say(f"    {'done' if exit_code == 0 else f'exit {exit_code}'} after {time.perf_counter() - began_s:.1f} s\n")
    return exit_code


def _report(config: DemoConfig, *, elapsed_s: float) -> int:
    out = config.out
    run = loading.load_run(out / "run.json")
    verdict = validate(run)
    save_record(out / "verdict.json", verdict)
    save_bytes(out / "report.html", html_page(run).encode())
    show(run_summary(run, verdict), to_stderr=config.is_json)
    _say(f"\n{elapsed_s:.0f} s in all; everything is in {out}/: open {out / 'report.html'}")
    if config.is_json:
        print_record(verdict)
    return COULD_NOT_MEASURE if exit_code_of(verdict) == COULD_NOT_MEASURE else 0


def _say_what_is_kept(config: DemoConfig, done: Sequence[Step], exit_code: int, *, stopped_in: str) -> None:
    kept = ", ".join(_kept(config, done)) or "nothing"
    word = "interrupted" if exit_code == INTERRUPTED else "stopped"
    _say(f"helixbench: {word} in {stopped_in!r}; kept in {config.out}/: {kept}")


def _kept(config: DemoConfig, done: Sequence[Step]) -> Iterator[str]:
    return (step.makes for step in done if (config.out / step.makes).exists())


def _say(text: str) -> None:
    typer.echo(text, err=True)
