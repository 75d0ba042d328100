"""The solver's commands: ``solve``, and of ``cluster`` ``make`` and ``device``. Parses, calls one function, prints."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn, TextIO

import typer

from helixbench.options import (
    AsJson,
    OutputTokens,
    PromptTokens,
    Trace,
    TraceFormat,
    TraceScale,
    TraceTokenizer,
    note,
    print_record,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    from helixbench.solver.problem.plan import Infeasible

DEFAULT_PROMPT_TOKENS = 512
DEFAULT_OUTPUT_TOKENS = 128
"""Of the default workload; the summary of a plan names its workload."""


def mount(app: typer.Typer) -> None:
    """Register the solver's command."""
    app.command()(solve)


def cluster_commands() -> typer.Typer:
    """The commands of ``cluster``, of which others may add more."""
    cluster = typer.Typer(
        help="Synthetic clusters, devices to emulate, and the nodes of a running server.", no_args_is_help=True
    )
    cluster.command("make")(make)
    cluster.command("device")(device)
    return cluster


def solve(
    cluster: Annotated[Path, typer.Argument(help="cluster.json, as `helixbench profile` writes it")],
    prompt_tokens: PromptTokens = None,
    output_tokens: OutputTokens = None,
    trace: Trace = None,
    trace_format: TraceFormat = "auto",
    trace_scale: TraceScale = 1.0,
    trace_tokenizer: TraceTokenizer = None,
    concurrency: Annotated[
        int | None, typer.Option(help="requests in flight [default: as many as the KV caches hold]")
    ] = None,
    objective: Annotated[
        Literal["throughput", "max-flow"], typer.Option(help="expected throughput, or the max-flow that bounds it")
    ] = "throughput",
    max_tpot_s: Annotated[float | None, typer.Option(help="upper limit on seconds per output token")] = None,
    max_ttft_s: Annotated[float | None, typer.Option(help="upper limit on seconds to the first output token")] = None,
    min_tokens_per_s: Annotated[
        float | None, typer.Option(help="plan the fewest nodes that are expected to give this throughput")
    ] = None,
    method: Annotated[str, typer.Option(help="auto, petals, swarm, homogeneous, separate or published")] = "auto",
    pin: Annotated[list[str] | None, typer.Option(help="NODE=[START,END): the layer range of a node")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="a node not to use")] = None,
    add: Annotated[list[str] | None, typer.Option(help="what if: with more nodes, for example 2xL4")] = None,
    remove: Annotated[list[str] | None, typer.Option(help="what if: without this node")] = None,
    time_limit_s: Annotated[float, typer.Option(help="return the best plan found by then")] = 60.0,
    threads: Annotated[int, typer.Option(help="threads of the MILP solver")] = 1,
    solver: Annotated[
        str, typer.Option(help="solver of integer programs, as PuLP names it: HiGHS, CBC, GUROBI, CPLEX, SCIP, ...")
    ] = "HiGHS",
    seed: Annotated[int, typer.Option(help="random seed; the same seed and input give the same plan")] = 0,
    survive: Annotated[int, typer.Option(help="1: the plan goes on after the loss of any one node")] = 0,
    no_partial: Annotated[
        bool, typer.Option("--no-partial", help="no partial inference: requests enter a range only at its start")
    ] = False,
    output: Annotated[Path, typer.Option("--output", "-o", help="where to write the plan")] = Path("plan.json"),
    as_json: AsJson = False,
) -> None:
    """Plan a model onto a cluster: the best placement found, a proven bound, and the expected throughput."""
    from helixbench.profiler.cluster import ClusterProfile
    from helixbench.records import load_record, require_writable, save_record
    from helixbench.solver.placement.progress import shown_progress
    from helixbench.solver.problem.plan import Infeasible
    from helixbench.solver.problem.traces import trace_of_options
    from helixbench.solver.problem.workload import fixed_workload, workload_of_options
    from helixbench.solver.questions.answer import answer
    from helixbench.solver.questions.config import SolveConfig
    from helixbench.solver.questions.summary import difference_lines, summary_lines
    from helixbench.solver.questions.what_if import parse_pins, with_nodes, without_nodes

    traced = trace_of_options(
        trace,
        kind=trace_format,
        scale=trace_scale,
        tokenizer=trace_tokenizer,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
    )
    workload = workload_of_options(
        prompt_tokens=prompt_tokens, output_tokens=output_tokens, trace=traced
    ) or fixed_workload(prompt_tokens=DEFAULT_PROMPT_TOKENS, output_tokens=DEFAULT_OUTPUT_TOKENS)
    as_it_is = without_nodes(load_record(cluster, ClusterProfile), exclude or [])
    config = SolveConfig(
        cluster=with_nodes(without_nodes(as_it_is, remove or []), add or []),
        before=as_it_is if add or remove else None,
        workload=workload,
        concurrency=concurrency,
        objective=objective,
        method=method,
        max_tpot_s=max_tpot_s,
        max_ttft_s=max_ttft_s,
        min_tokens_per_s=min_tokens_per_s,
        partial=not no_partial,
        survive=survive,
        pins=parse_pins(pin or []),
        time_limit_s=time_limit_s,
        threads=threads,
        solver=solver,
        seed=seed,
    )
    require_writable(output)
    with shown_progress() as on_progress:
        answered = answer(config, on_progress)
    plan, before = answered.plan, answered.before
    if isinstance(plan, Infeasible):
        _end_infeasible(plan, as_json=as_json)
    save_record(output, plan)
    where = sys.stderr if as_json else sys.stdout
    _print(summary_lines(plan), file=where)
    if isinstance(before, Infeasible):
        _print([f"the cluster as it is has no plan: {before.reason}"], file=where)
    elif before is not None:
        _print(["compared with the cluster as it is:", *difference_lines(config.cluster, before, plan)], file=where)
    if as_json:
        print_record(plan)
    note(f"plan written to {output}")


def make(
    output: Annotated[Path, typer.Option("--output", "-o", help="where to write the cluster")],
    nodes: Annotated[int, typer.Option(help="number of nodes")] = 24,
    types: Annotated[int, typer.Option(help="number of device types, up to 8")] = 3,
    regions: Annotated[int, typer.Option(help="number of regions, with slow links between them")] = 1,
    layers: Annotated[int, typer.Option(help="number of layers of the model, 1.53 GB each")] = 80,
    seed: Annotated[int, typer.Option(help="random seed; the same seed gives the same cluster")] = 0,
) -> None:
    """Make a synthetic cluster from a seed, to try the solver on. Its figures are not measured."""
    from helixbench.records import save_record
    from helixbench.solver.questions.generate import make_cluster

    made = make_cluster(num_nodes=nodes, num_types=types, num_regions=regions, num_layers=layers, seed=seed)
    save_record(output, made)
    note(f"cluster written to {output}")


def device(
    cluster: Annotated[Path, typer.Argument(help="cluster.json, as `helixbench profile` writes it")],
    node: Annotated[str, typer.Argument(help="the node whose device to export")],
    output: Annotated[Path, typer.Option("--output", "-o", help="where to write the device file")],
) -> None:
    """Export a profiled device, to be emulated in a testbed (device = "emulated:FILE.json")."""
    from helixbench.profiler.cluster import ClusterProfile
    from helixbench.profiler.emulated_device import device_of_node
    from helixbench.records import load_record, save_record

    save_record(output, device_of_node(load_record(cluster, ClusterProfile), node))
    note(f"device file written to {output}")


def _print(lines: Iterable[str], *, file: TextIO) -> None:
    for line in lines:
        print(line, file=file)


def _end_infeasible(found: Infeasible, *, as_json: bool) -> NoReturn:
    if as_json:
        print_record(found)
    note(f"helixbench: infeasible: {found.reason}")
    raise typer.Exit(1)
