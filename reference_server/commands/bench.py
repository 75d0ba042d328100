"""The command ``bench``: run a plan under load and measure it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from helixbench.errors import InputError
from helixbench.options import AsJson, ModelDirectory, OutputTokens, PromptTokens, Trace, TraceScale
from helixbench.reference_server.commands.nodes import (
    OUTAGE_S,
    AgentsKey,
    AllowStale,
    EventsFile,
    NoReflow,
    NoReplan,
    OutageS,
    ReplayMemory,
    RunningAgents,
    TakeOver,
    TestbedFile,
    adapt_options,
    logs_beside,
    nodes_of_options,
    rig_of,
    run_job,
    show_written,
)

if TYPE_CHECKING:
    from helixbench.reference_server.jobs.job import Job
    from helixbench.reference_server.testbed.testbed import Testbed


def bench(
    plan: Annotated[Path, typer.Argument(help="the plan to run")],
    model: ModelDirectory,
    output: Annotated[Path, typer.Option("--output", "-o", help="the run log to write")],
    testbed: TestbedFile = None,
    agent: RunningAgents = None,
    key: AgentsKey = None,
    concurrency: Annotated[
        int | None, typer.Option(min=1, help="requests in flight; default: as the plan assumes")
    ] = None,
    requests: Annotated[int | None, typer.Option(min=1, help="number of requests to measure")] = None,
    duration_s: Annotated[float | None, typer.Option("--duration-s", min=1, help="seconds to measure (30)")] = None,
    prompt_tokens: PromptTokens = None,
    output_tokens: OutputTokens = None,
    trace: Trace = None,
    trace_scale: TraceScale = 1.0,
    routing: Annotated[
        Literal["iwrr", "adaptive", "fixed", "random", "shortest-queue"], typer.Option(help="how pipelines are chosen")
    ] = "iwrr",
    seed: Annotated[int, typer.Option(help="of prompts and of the order of lengths")] = 0,
    events: EventsFile = None,
    history: Annotated[
        Path | None, typer.Option("--history", help="write what each client saw, as JSON lines, for `helixbench check`")
    ] = None,
    no_reflow: NoReflow = False,
    no_replan: NoReplan = False,
    outage_s: OutageS = OUTAGE_S,
    replay_memory: ReplayMemory = "",
    take_over: TakeOver = False,
    allow_stale: AllowStale = False,
    as_json: AsJson = False,
) -> None:
    """Run a plan under closed-loop load and write what was measured."""
    from helixbench.profiler.model.files import resolve_model
    from helixbench.records import command_line, load_record, require_writable
    from helixbench.reference_server.coordinator.live_events import require_possible
    from helixbench.reference_server.jobs.job import BenchJob
    from helixbench.solver.problem.plan import Plan
    from helixbench.solver.problem.workload import workload_of_options
    from helixbench.solver.simulation.events import load_events

    made = load_record(plan, Plan)
    spec = nodes_of_options(testbed, agent, key)
    if requests is not None and duration_s is not None:
        raise InputError("--requests and --duration-s: give one of them")
    workload = (
        workload_of_options(
            prompt_tokens=prompt_tokens, output_tokens=output_tokens, trace=trace, trace_scale=trace_scale
        )
        or made.assumptions.workload
    )
    in_flight = concurrency or made.assumptions.concurrency
    if in_flight is None:
        raise InputError(f"--concurrency is missing, and {plan} was not solved for one; give the requests in flight")

    to_happen = () if events is None else load_events(events)
    adapt = adapt_options(
        spec,
        take_over=take_over,
        outage_s=outage_s,
        replay_memory=replay_memory,
        no_reflow=no_reflow,
        no_replan=no_replan,
    )
    directory = str(resolve_model(model))  # here, where a hub can be reached: a testbed's namespaces reach nothing

    def job(bed: Testbed) -> Job:
        rig = rig_of(bed)
        require_possible(to_happen, rig, made.placement, where=str(events))
        return BenchJob(
            command=command_line(),
            plan=plan.resolve(),
            model=directory,
            addresses=dict(bed.addresses),
            key_file=bed.key_file,
            testbed=bed.description,
            timing=bed.timing,
            output=output.resolve(),
            workload=workload,
            concurrency=in_flight,
            routing=routing,
            seed=seed,
            num_requests=requests,
            duration_s=None if requests is not None else duration_s or 30.0,
            events=to_happen,
            rig=rig,
            history=None if history is None else history.resolve(),
            adapt=adapt,
            allow_stale=allow_stale,
        )

    for written in filter(None, (output, history)):
        require_writable(written)
    run_job(spec, job, log_dir=logs_beside(output))
    show_written(output, as_json=as_json)
