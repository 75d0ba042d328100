"""The command ``gate``: a run against its plan, recorded runs or plans against others, and two commands in turn."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, NoReturn

import typer
from typer.core import TyperGroup

from helixbench.errors import InputError
from helixbench.options import AsJson, print_record
from helixbench.reports.output import ClientBenchmark, ClientFile, MarkdownFile, PlanFile, show, write

if TYPE_CHECKING:
    import msgspec

    from helixbench.reports.compare.regression import Question, Regression
    from helixbench.reports.gate.cases import Case
    from helixbench.reports.verdict.verdict import Band

JunitFile = Annotated[Path | None, typer.Option(metavar="FILE", help="write JUnit XML")]
BenchmarkFile = Annotated[Path | None, typer.Option(metavar="FILE", help="write pytest-benchmark JSON")]
Strict = Annotated[bool, typer.Option("--strict", help="exit 4 if the pairs do not decide")]
Metric = Annotated[str, typer.Option(help="a metric of a run, wall_s, or a dotted path in a JSON object")]
Better = Annotated[Literal["higher", "lower"] | None, typer.Option(help="better direction; default: by the name")]
MinEffect = Annotated[float, typer.Option(help="smallest relative change that matters")]


class GateGroup(TyperGroup):
    """``gate FILE ...`` stands for ``gate check FILE ...``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Insert the default subcommand. ``ctx`` is click's or typer's own Context, depending on the version."""
        if args and args[0] not in self.commands and args[0] not in ctx.help_option_names:
            args = ["check", *args]
        return super().parse_args(ctx, args)


class _Outputs(NamedTuple):
    """Files to write besides the terminal output, and how undecided cases count."""

    junit: Path | None
    markdown: Path | None
    benchmark_json: Path | None
    is_json: bool
    is_strict: bool


def mount(app: typer.Typer) -> None:
    """Register ``gate`` and its subcommands."""
    group = typer.Typer(
        cls=GateGroup,
        no_args_is_help=True,
        help="Gate a run on its plan (`gate RUN`), or NEW on BASE. "
        "Exit 0 pass, 1 fail, 2 invalid input, 3 could not measure, 4 undecided with --strict.",
    )
    group.command("check")(check_command)
    group.command("pairs")(pairs_command)
    app.add_typer(group, name="gate")


def check_command(
    run: Annotated[Path, typer.Argument(help="run.json; with NEW: a run, a folder of runs, or a plan")],
    new: Annotated[Path | None, typer.Argument(help="what to compare with: again runs or a plan")] = None,
    min_ratio: Annotated[float, typer.Option(help="lowest accepted measured / expected")] = 0.85,
    max_ratio: Annotated[float, typer.Option(help="highest accepted measured / expected")] = 1.05,
    max_latency_ratio: Annotated[
        float, typer.Option(help="highest accepted measured / promised percentile of TTFT and TPOT (open loop)")
    ] = 1.25,
    plan: PlanFile = None,
    client: ClientFile = None,
    client_benchmark: ClientBenchmark = None,
    metric: Metric = "total_tokens_per_s",
    min_effect: MinEffect = 0.05,
    strict: Strict = False,
    junit: JunitFile = None,
    markdown: MarkdownFile = None,
    benchmark_json: BenchmarkFile = None,
    as_json: AsJson = False,
) -> None:
    """The default: gate RUN on its own plan. With NEW: gate recorded runs (files or folders) or plans on RUN."""
    from helixbench.reports import loading

    outputs = _Outputs(junit, markdown, benchmark_json, as_json, strict)
    if new is None:
        _gate_run(run, plan, _band(min_ratio, max_ratio, max_latency_ratio), (client, client_benchmark), outputs)
    if client is not None:
        raise InputError("--client: goes with one run, which is gated on its plan")
    if loading.is_plan(run):
        _gate_plans(run, new, min_effect, outputs)
    from helixbench.reports.compare.repeats import judge_recorded

    _finish_regression(judge_recorded(_question(metric, None, min_effect=min_effect), run, new), outputs)


def pairs_command(
    base: Annotated[str, typer.Option(help="command of the base side", show_default=False)],
    new: Annotated[str, typer.Option(help="command of the new side", show_default=False)],
    metric: Metric = "wall_s",
    better: Better = None,
    min_effect: MinEffect = 0.05,
    rounds: Annotated[int, typer.Option(help="pairs to measure first")] = 6,
    max_rounds: Annotated[int, typer.Option(help="pairs to measure at most, while undecided")] = 16,
    strict: Strict = False,
    timeout_s: Annotated[float, typer.Option(help="time limit of one process, in seconds")] = 600.0,
    junit: JunitFile = None,
    markdown: MarkdownFile = None,
    benchmark_json: BenchmarkFile = None,
    as_json: AsJson = False,
) -> None:
    """Run two commands in turn, a fresh process each time, and gate on the ratios of the pairs.

    A command reports its metric in a JSON object, in the file {out} or on the last line of its stdout.
    """
    from helixbench.reports.compare.regression import measure_regression
    from helixbench.reports.gate.pairs import measure_commands

    question = _question(metric, better, min_effect=min_effect, rounds=rounds, max_rounds=max_rounds)
    measure = measure_commands({"base": base, "new": new}, metric, timeout_s=timeout_s)
    outputs = _Outputs(junit, markdown, benchmark_json, as_json, strict)
    _finish_regression(measure_regression(question, measure), outputs)


def _band(min_ratio: float, max_ratio: float, max_latency_ratio: float) -> Band:
    from helixbench.reports.verdict.verdict import Band

    try:
        return Band(min_ratio=min_ratio, max_ratio=max_ratio, max_latency_ratio=max_latency_ratio)
    except ValueError as error:
        raise InputError(
            f"--min-ratio {min_ratio:g} --max-ratio {max_ratio:g} --max-latency-ratio {max_latency_ratio:g}: {error}"
        ) from error


def _gate_run(
    run: Path, plan: Path | None, band: Band, client: tuple[Path | None, int | None], outputs: _Outputs
) -> NoReturn:
    from helixbench.reference_server.run_log import RunLog
    from helixbench.reports import loading
    from helixbench.reports.gate.benchmark_json import run_samples
    from helixbench.reports.gate.cases import ExitCode, exit_code_of, run_cases
    from helixbench.reports.verdict.validate import validate

    log = loading.load_output(run, RunLog)
    if plan is not None:
        loading.require_plan(log, plan, origin=run)
    verdict = validate(log, band, client=loading.client_of_options(log, *client, origin=run))
    cases = run_cases(verdict)
    word = {ExitCode.PASS: "PASS  ", ExitCode.FAIL: "FAIL  "}.get(exit_code_of(cases), "")
    typer.echo(f"{word}{verdict.statement}", err=outputs.is_json)
    if verdict.client is not None:
        typer.echo(f"      {verdict.client.statement}", err=outputs.is_json)
    _finish(cases, verdict, run_samples(log), outputs)


def _gate_plans(base: Path, new: Path, tolerance: float, outputs: _Outputs) -> NoReturn:
    from helixbench.reports.gate.cases import GateRecord, plan_cases, worst_first
    from helixbench.reports.loading import load_output
    from helixbench.solver.problem.plan import Plan

    cases = plan_cases(load_output(base, Plan), load_output(new, Plan), tolerance=tolerance)
    for case in worst_first(cases):
        typer.echo(f"{case.status.upper():6}  {case.name}: {case.message}", err=outputs.is_json)
    _finish(cases, GateRecord(cases=cases), {}, outputs)


def _finish_regression(regression: Regression, outputs: _Outputs) -> NoReturn:
    from helixbench.reports.gate.benchmark_json import regression_samples
    from helixbench.reports.gate.cases import regression_cases
    from helixbench.reports.render.comparisons import regression_summary

    show(regression_summary(regression), to_stderr=outputs.is_json)
    _finish(regression_cases(regression), regression, regression_samples(regression), outputs)


def _finish(
    cases: Sequence[Case], record: msgspec.Struct, samples: Mapping[str, Sequence[float]], outputs: _Outputs
) -> NoReturn:
    """Write the files that were asked for, print annotations inside GitHub Actions, and exit."""
    import json

    from helixbench.reports.gate.annotations import annotation_lines
    from helixbench.reports.gate.benchmark_json import benchmark_json
    from helixbench.reports.gate.cases import exit_code_of
    from helixbench.reports.gate.junit import junit_xml
    from helixbench.reports.gate.summary import gate_summary
    from helixbench.reports.render.markdown import markdown

    if outputs.junit is not None:
        write(outputs.junit, junit_xml(cases, is_strict=outputs.is_strict))
    if outputs.markdown is not None:
        write(outputs.markdown, markdown(gate_summary(cases)))
    if outputs.benchmark_json is not None:
        write(outputs.benchmark_json, json.dumps(benchmark_json(samples), indent=1))
    if os.environ.get("GITHUB_ACTIONS") == "true":
        for line in annotation_lines(cases):
            typer.echo(line, err=outputs.is_json)
    if outputs.is_json:
        print_record(record)
    raise typer.Exit(exit_code_of(cases, is_strict=outputs.is_strict))


def _question(metric: str, better: str | None, *, min_effect: float, rounds: int = 6, max_rounds: int = 16) -> Question:
    from helixbench.reports.compare.regression import Question, is_higher_better

    is_higher = is_higher_better(metric) if better is None else better == "higher"
    if is_higher is None:
        raise InputError(f"--metric {metric}: add --better higher or --better lower")
    try:
        return Question(
            metric=metric, is_higher_better=is_higher, min_effect=min_effect, rounds=rounds, max_rounds=max_rounds
        )
    except ValueError as error:
        raise InputError(f"--min-effect, --rounds, --max-rounds: {error}") from error
