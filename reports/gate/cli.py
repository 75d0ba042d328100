"""The command ``gate``: a run against its plan, NEW against BASE, and how often the gate itself errs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from helixbench.errors import InputError
from helixbench.reports.options import AsJson, MarkdownFile, PlanFile, note, print_record, show

if TYPE_CHECKING:
    from helixbench.reports.compare.regression import Question, Regression
    from helixbench.reports.gate.cases import Case
    from helixbench.reports.verdict.verdict import Band

JunitFile = Annotated[Path | None, typer.Option(metavar="FILE", help="write JUnit XML")]
BenchmarkFile = Annotated[Path | None, typer.Option(metavar="FILE", help="write pytest-benchmark JSON")]
Strict = Annotated[bool, typer.Option("--strict", help="exit 4 where the pairs do not decide")]
Metric = Annotated[str, typer.Option(help="a run's metric, wall_s, or a dotted path in a JSON object")]
Better = Annotated[str | None, typer.Option(help="higher or lower; default: by the metric's name")]
MinEffect = Annotated[float, typer.Option(help="least change that counts, as a share")]
Rounds = Annotated[int, typer.Option(help="pairs at first")]
MaxRounds = Annotated[int, typer.Option(help="pairs at most, while undecided")]
Timeout = Annotated[float, typer.Option(help="seconds that one process may take")]


class GateGroup(TyperGroup):
    """``gate FILE ...`` is ``gate check FILE ...``: the first word is a subcommand only where it is the name of one."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the default subcommand in front of a file. ``ctx`` is click's, or typer's own copy of it: by version."""
        if args and args[0] not in self.commands and args[0] not in ctx.help_option_names:
            args = ["check", *args]
        return super().parse_args(ctx, args)


def mount(app: typer.Typer) -> None:
    """Register ``gate`` and its subcommands."""
    group = typer.Typer(
        cls=GateGroup,
        no_args_is_help=True,
        help="Gate a run on its plan (`gate RUN`) or NEW on BASE. "
        "Exit 0 pass, 1 fail, 2 bad input, 3 could not measure, 4 undecided with --strict.",
    )
    group.command("check")(check_command)
    group.command("pairs")(pairs_command)
    group.command("calibrate")(calibrate_command)
    app.add_typer(group, name="gate")


def check_command(
    run: Annotated[Path, typer.Argument(help="run.json; with NEW: a run or a folder of repeats", show_default=False)],
    new: Annotated[Path | None, typer.Argument(help="run.json or a folder of repeats", show_default=False)] = None,
    min_ratio: Annotated[float, typer.Option(help="least measured / expected")] = 0.85,
    max_ratio: Annotated[float, typer.Option(help="most measured / expected")] = 1.05,
    plan: PlanFile = None,
    metric: Metric = "total_tokens_per_s",
    min_effect: MinEffect = 0.05,
    strict: Strict = False,
    junit: JunitFile = None,
    markdown: MarkdownFile = None,
    benchmark_json: BenchmarkFile = None,
    as_json: AsJson = False,
) -> None:
    """The default: RUN against its own plan; with NEW, runs (files or folders) or plans against each other."""
    if new is not None:
        from helixbench.reports.compare.repeats import are_runs, judge_recorded

        question = _question(metric, None, min_effect=min_effect)
        if not are_runs(run):
            _finish_exact(run, new, min_effect, junit, markdown, is_json=as_json)
        _finish_regression(judge_recorded(question, run, new), strict, junit, markdown, benchmark_json, is_json=as_json)
    from helixbench.reports import loading
    from helixbench.reports.gate.benchmark_json import run_samples
    from helixbench.reports.gate.cases import calibration_cases
    from helixbench.reports.gate.gate import gate

    band = _band(min_ratio, max_ratio)
    log = loading.load_run(run)
    if plan is not None:
        loading.require_plan(log, plan, origin=run)
    result = gate(log, min_ratio=band.min_ratio, max_ratio=band.max_ratio)
    word = {0: "PASS  ", 1: "FAIL  ", 3: ""}[result.exit_code]
    typer.echo(f"{word}{result.message}", err=as_json)
    _write(calibration_cases(result.verdict), run_samples(log), junit, markdown, benchmark_json, is_json=as_json)
    if as_json:
        print_record(result.verdict)
    raise typer.Exit(result.exit_code)


def pairs_command(
    base: Annotated[str, typer.Option(help="command of the old side", show_default=False)],
    new: Annotated[str, typer.Option(help="command of the new side", show_default=False)],
    metric: Metric = "wall_s",
    better: Better = None,
    min_effect: MinEffect = 0.05,
    rounds: Rounds = 6,
    max_rounds: MaxRounds = 16,
    strict: Strict = False,
    timeout_s: Timeout = 600.0,
    junit: JunitFile = None,
    markdown: MarkdownFile = None,
    benchmark_json: BenchmarkFile = None,
    as_json: AsJson = False,
) -> None:
    """Run two commands in turn, fresh processes each, and gate on the log ratios of the pairs.

    A command says its numbers as a JSON object in the file {out}, or on the last line of its stdout.
    """
    from helixbench.reports.compare.regression import run_gate
    from helixbench.reports.gate.pairs import measure_commands

    question = _question(metric, better, min_effect=min_effect, rounds=rounds, max_rounds=max_rounds)
    measure = measure_commands({"base": base, "new": new}, metric, timeout_s=timeout_s)
    _finish_regression(run_gate(question, measure), strict, junit, markdown, benchmark_json, is_json=as_json)


def calibrate_command(
    command: Annotated[str | None, typer.Option(help="run as both sides; default: a built-in load")] = None,
    metric: Metric = "median_s",
    better: Better = None,
    handicap: Annotated[float, typer.Option(help="share of more work for NEW; the built-in load only")] = 0.0,
    trials: Annotated[int, typer.Option(help="whole gates to run", min=1)] = 20,
    min_effect: MinEffect = 0.05,
    rounds: Rounds = 6,
    max_rounds: MaxRounds = 16,
    timeout_s: Timeout = 600.0,
    as_json: AsJson = False,
) -> None:
    """How often this gate errs on this machine: SLOWER on identical code is a false alarm."""
    from helixbench.reports.gate.calibrate import calibrate
    from helixbench.reports.gate.pairs import load_command, measure_commands

    if command is not None and handicap:
        raise InputError("--handicap goes with the built-in load; leave out --command")
    if not -0.9 <= handicap <= 10:
        raise InputError(f"--handicap {handicap:g}: need a share between -0.9 and 10")
    question = _question(metric, better, min_effect=min_effect, rounds=rounds, max_rounds=max_rounds)
    base, new = command or load_command(work=1.0), command or load_command(work=1.0 + handicap)
    measure = measure_commands({"base": base, "new": new}, metric, timeout_s=timeout_s)

    def say(index: int, regression: Regression) -> None:
        note(f"trial {index + 1}/{trials}  {regression.statement}")

    found = calibrate(question, measure, trials=trials, handicap=handicap, on_trial=say)
    counts = ", ".join(f"{answer} {count}" for answer, count in found.answers.items())
    typer.echo(f"{found.statement}; {counts}; {found.processes} processes", err=as_json)
    if as_json:
        print_record(found)


def _finish_exact(
    base: Path, new: Path, tolerance: float, junit: Path | None, markdown: Path | None, *, is_json: bool
) -> None:
    from helixbench.reports.gate.cases import worst_first
    from helixbench.reports.gate.exact import exact_cases, exit_code_of, load_figures

    cases = exact_cases(load_figures(base, tolerance=tolerance), load_figures(new, tolerance=tolerance))
    for case in worst_first(cases):
        typer.echo(f"{case.status.upper():6}  {case.name}: {case.message}", err=is_json)
    _write(cases, {}, junit, markdown, None, is_json=is_json)
    if is_json:
        import msgspec

        typer.echo(msgspec.json.format(msgspec.json.encode(cases), indent=1))
    raise typer.Exit(exit_code_of(cases))


def _finish_regression(
    regression: Regression,
    is_strict: bool,
    junit: Path | None,
    markdown: Path | None,
    benchmark_json: Path | None,
    *,
    is_json: bool,
) -> None:
    from helixbench.reports.compare.regression import exit_code_of
    from helixbench.reports.compare.terminal import regression_summary
    from helixbench.reports.gate.benchmark_json import regression_samples
    from helixbench.reports.gate.cases import regression_cases

    show(regression_summary(regression), to_stderr=is_json)
    cases = regression_cases(regression, is_strict=is_strict)
    _write(cases, regression_samples(regression), junit, markdown, benchmark_json, is_json=is_json)
    if is_json:
        print_record(regression)
    raise typer.Exit(exit_code_of(regression, is_strict=is_strict))


def _write(
    cases: Sequence[Case],
    samples: dict[str, tuple[float, ...]],
    junit: Path | None,
    markdown: Path | None,
    benchmark_json: Path | None,
    *,
    is_json: bool,
) -> None:
    """The files that were asked for; inside GitHub Actions the annotations as well."""
    import msgspec

    from helixbench.records import save_bytes
    from helixbench.reports.gate.annotations import annotation_lines
    from helixbench.reports.gate.benchmark_json import benchmark_json as benchmark_object
    from helixbench.reports.gate.junit import junit_xml
    from helixbench.reports.render.markdown import fit, gate_markdown

    if junit is not None:
        save_bytes(junit, junit_xml(cases).encode())
    if markdown is not None:
        save_bytes(markdown, fit(gate_markdown(cases)).encode())
    if benchmark_json is not None:
        save_bytes(benchmark_json, msgspec.json.format(msgspec.json.encode(benchmark_object(samples)), indent=1))
    if os.environ.get("GITHUB_ACTIONS") == "true":
        for line in annotation_lines(cases):
            typer.echo(line, err=is_json)


def _question(metric: str, better: str | None, *, min_effect: float, rounds: int = 6, max_rounds: int = 16) -> Question:
    from helixbench.reports.compare.regression import Question
    from helixbench.reports.verdict.metrics import IS_HIGHER_BETTER

    if better not in (None, "higher", "lower"):
        raise InputError(f"--better {better}: need higher or lower")
    if better is None and metric in IS_HIGHER_BETTER:
        is_higher_better = IS_HIGHER_BETTER[metric]
    elif better is None and metric.endswith("_per_s"):
        is_higher_better = True
    elif better is None and metric.endswith("_s"):
        is_higher_better = False
    elif better is None:
        raise InputError(f"--metric {metric}: say --better higher or --better lower")
    else:
        is_higher_better = better == "higher"
    try:
        return Question(
            metric=metric,
            is_higher_better=is_higher_better,
            min_effect=min_effect,
            rounds=rounds,
            max_rounds=max_rounds,
        )
    except ValueError as error:
        raise InputError(f"--min-effect, --rounds, --max-rounds: {error}") from error


def _band(min_ratio: float, max_ratio: float) -> Band:
    from helixbench.reports.verdict.verdict import Band

    try:
        return Band(min_ratio=min_ratio, max_ratio=max_ratio)
    except ValueError as error:
        raise InputError(f"--min-ratio {min_ratio:g} --max-ratio {max_ratio:g}: {error}") from error
