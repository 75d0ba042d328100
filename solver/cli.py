"""The solver's commands: ``solve`` and ``cluster make``. Parses, calls one function, prints."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn, TextIO

import typer

from helixbench.options import AsJson, OutputTokens, PromptTokens, Trace, TraceScale

if TYPE_CHECKING:
    from collections.abc import Iterable

    from helixbench.solver.problem.plan import Infeasible

DEFAULT_PROMPT_TOKENS = 512
DEFAULT_OUTPUT_TOKENS = 128
"""Of the workload that is planned for when none is given; the summary says which it was."""

ONE_MORE_SHARE = 0.25
"""Of the time limit: what is spent beyond it on whether fewer nodes do as well and what one more of each type adds."""

FEWER_SHARE = 0.3
"""Of that: what is spent on fewer nodes."""


def mount(app: typer.Typer) -> None:
    """Register the solver's commands."""
    app.command()(solve)
    cluster = typer.Typer(help="Made-up clusters.", no_args_is_help=True)
    cluster.command("make")(make)
    app.add_typer(cluster, name="cluster")


def solve(
    cluster: Annotated[Path, typer.Argument(help="cluster.json, as `helixbench profile` writes it")],
    prompt_tokens: PromptTokens = None,
    output_tokens: OutputTokens = None,
    trace: Trace = None,
    trace_scale: TraceScale = 1.0,
    concurrency: Annotated[
        int | None, typer.Option(help="requests in flight; without it as many as the KV caches hold")
    ] = None,
    objective: Annotated[
        Literal["throughput", "max-flow"], typer.Option(help="expected tokens/s, or the largest flow")
    ] = "throughput",
    max_tpot_s: Annotated[float | None, typer.Option(help="most seconds for each output token")] = None,
    max_ttft_s: Annotated[float | None, typer.Option(help="most seconds to the first output token")] = None,
    min_tokens_per_s: Annotated[float | None, typer.Option(help="fewest nodes that are expected to give this")] = None,
    method: Annotated[str, typer.Option(help="auto, petals, swarm, homogeneous, separate or published")] = "auto",
    compare: Annotated[bool, typer.Option("--compare", help="print all methods side by side")] = False,
    pin: Annotated[list[str] | None, typer.Option(help="NODE=[START,END): what a node has to hold")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="a node not to use")] = None,
    add: Annotated[list[str] | None, typer.Option(help="what if: more nodes, like 2xL4")] = None,
    remove: Annotated[list[str] | None, typer.Option(help="what if: without that node")] = None,
    one_more_s: Annotated[
        float | None,
        typer.Option(
            min=0, help="seconds for what fewer nodes, and one more of each type, give (a quarter of the limit)"
        ),
    ] = None,
    time_limit_s: Annotated[float, typer.Option(help="return the best plan by then")] = 60.0,
    threads: Annotated[int, typer.Option(help="threads of the solver")] = 1,
    seed: Annotated[int, typer.Option(help="same input and seed, same plan")] = 0,
    no_partial: Annotated[bool, typer.Option("--no-partial", help="requests enter ranges only at their start")] = False,
    output: Annotated[Path, typer.Option("--output", "-o", help="where the plan goes")] = Path("plan.json"),
    as_json: AsJson = False,
) -> None:
    """Plan a model onto a cluster: the best placement in the time given, its proven bound and what to expect."""
    from helixbench.errors import InputError
    from helixbench.profiler.cluster import ClusterProfile
    from helixbench.records import encode_record, load_record, require_writable, save_record
    from helixbench.solver.flow.marginal import one_more_in_words
    from helixbench.solver.placement.live import shown_progress
    from helixbench.solver.problem.plan import Infeasible
    from helixbench.solver.problem.workload import fixed_workload, workload_of_options
    from helixbench.solver.questions.compare import comparison_lines
    from helixbench.solver.questions.request import (
        PlanRequest,
        answer,
        answer_what_if,
        asks_for_one_more,
        with_fewer_nodes,
        with_one_more,
    )
    from helixbench.solver.questions.summary import summary_lines
    from helixbench.solver.questions.what_if import difference_lines, parse_pins, with_nodes, without_nodes

    workload = workload_of_options(
        prompt_tokens=prompt_tokens, output_tokens=output_tokens, trace=trace, trace_scale=trace_scale
    ) or fixed_workload(prompt_tokens=DEFAULT_PROMPT_TOKENS, output_tokens=DEFAULT_OUTPUT_TOKENS)
    as_it_is = without_nodes(load_record(cluster, ClusterProfile), exclude or [])
    request = PlanRequest(
        profile=with_nodes(without_nodes(as_it_is, remove or []), add or []),
        workload=workload,
        concurrency=concurrency,
        objective=objective,
        method=method,
        max_tpot_s=max_tpot_s,
        max_ttft_s=max_ttft_s,
        min_tokens_per_s=min_tokens_per_s,
        partial=not no_partial,
        pins=parse_pins(pin or []),
        time_limit_s=time_limit_s,
        threads=threads,
        seed=seed,
    )
    if one_more_s is not None and not 0 <= one_more_s < float("inf"):
        raise InputError(f"--one-more-s {one_more_s}: need a finite number of seconds, 0 or more")
    require_writable(output)
    with shown_progress() as on_progress:
        if add or remove:
            before, plan = answer_what_if(request, as_it_is, on_progress)
        else:
            before, plan = None, answer(request, on_progress)
    if isinstance(plan, Infeasible):
        _end_infeasible(plan, as_json=as_json)
    save_record(output, plan)
    where = sys.stderr if as_json else sys.stdout
    _print(summary_lines(plan), file=where)
    if isinstance(before, Infeasible):
        _print([f"the cluster as it is has no plan: {before.reason}"], file=where)
    elif before is not None:
        _print(["against the cluster as it is:", *difference_lines(request.profile, before, plan)], file=where)
    seconds = ONE_MORE_SHARE * time_limit_s if one_more_s is None else one_more_s
    saved = plan
    try:
        if compare and plan.solver.status != "interrupted":
            _print(comparison_lines(request, plan), file=where)
        if asks_for_one_more(request, plan) and seconds > 0:
            with shown_progress() as on_progress:
                plan = with_fewer_nodes(request, plan, seconds=FEWER_SHARE * seconds, on_progress=on_progress)
                _print(plan.assumptions.notes[len(saved.assumptions.notes) :], file=where)
                plan = with_one_more(request, plan, seconds=(1 - FEWER_SHARE) * seconds, on_progress=on_progress)
            _print(one_more_in_words(plan.predicted.one_more, objective), file=where)
    except KeyboardInterrupt:  # the plan itself is there; what was still to be told of it is not wanted
        print("interrupted: the rest is left out", file=sys.stderr)
    if plan is not saved:
        save_record(output, plan)
    if as_json:
        sys.stdout.write(encode_record(plan).decode())
    print(f"plan written to {output}", file=sys.stderr)


def make(
    output: Annotated[Path, typer.Option("--output", "-o", help="where the cluster goes")],
    nodes: Annotated[int, typer.Option(help="how many nodes")] = 24,
    types: Annotated[int, typer.Option(help="how many types of device, up to 8")] = 3,
    regions: Annotated[int, typer.Option(help="how many regions, with slow links between them")] = 1,
    layers: Annotated[int, typer.Option(help="how many layers the model has, of 1.53 GB each")] = 80,
    seed: Annotated[int, typer.Option(help="same numbers and seed, same cluster")] = 0,
) -> None:
    """Make a cluster from a seed, to try the solver on. Its figures are not measured."""
    from helixbench.records import save_record
    from helixbench.solver.questions.generate import make_cluster

    made = make_cluster(num_nodes=nodes, num_types=types, num_regions=regions, num_layers=layers, seed=seed)
    save_record(output, made)
    print(f"cluster written to {output}", file=sys.stderr)


def _print(lines: Iterable[str], *, file: TextIO) -> None:
    """Each line as it comes: a comparison takes its time."""
    for line in lines:
        print(line, file=file, flush=True)


def _end_infeasible(found: Infeasible, *, as_json: bool) -> NoReturn:
    from helixbench.records import encode_record

    if as_json:
        sys.stdout.write(encode_record(found).decode())
    print(f"helixbench: infeasible: {found.reason}", file=sys.stderr)
    raise typer.Exit(1)
