"""The command ``bench``: run a plan under load and measure it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from helixbench.errors import InputError
from helixbench.options import (
    AsJson,
    Burstiness,
    MaxTpotS,
    MaxTtftS,
    ModelDirectory,
    OutputTokens,
    PromptTokens,
    Rate,
    Replay,
    Speedup,
    Trace,
    TraceFormat,
    TraceScale,
    TraceTokenizer,
    note,
)
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
        int | None,
        typer.Option(min=1, help="requests in flight (default: as the plan assumes); in an open loop at most"),
    ] = None,
    requests: Annotated[
        int | None, typer.Option(min=1, help="number of requests to measure; in an open loop, requests in all")
    ] = None,
    duration_s: Annotated[float | None, typer.Option("--duration-s", min=1, help="seconds to measure (30)")] = None,
    prompt_tokens: PromptTokens = None,
    output_tokens: OutputTokens = None,
    trace: Trace = None,
    trace_format: TraceFormat = "auto",
    trace_scale: TraceScale = 1.0,
    trace_tokenizer: TraceTokenizer = None,
    rate: Rate = None,
    burstiness: Burstiness = 1.0,
    replay: Replay = False,
    speedup: Speedup = 1.0,
    warmup_s: Annotated[float, typer.Option("--warmup-s", min=0, help="shortest warm-up before the window")] = 0.0,
    max_ttft_s: MaxTtftS = None,
    max_tpot_s: MaxTpotS = None,
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
    """Run a plan under load, closed or open loop, and write what was measured."""
    from helixbench.profiler.model.files import resolve_model
    from helixbench.records import command_line, load_record, require_writable
    from helixbench.reference_server.coordinator.live_events import require_possible
    from helixbench.reference_server.jobs.job import BenchJob
    from helixbench.reference_server.run_log import limits_of_options
    from helixbench.solver.problem.arrivals import arrivals_of_options
    from helixbench.solver.problem.plan import Plan
    from helixbench.solver.problem.traces import trace_of_options
    from helixbench.solver.problem.workload import workload_of_options
    from helixbench.solver.simulation.events import load_events

    made = load_record(plan, Plan)
    spec = nodes_of_options(testbed, agent, key)
    traced = trace_of_options(
        trace,
        kind=trace_format,
        scale=trace_scale,
        tokenizer=trace_tokenizer,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
    )
    arrivals = arrivals_of_options(rate=rate, burstiness=burstiness, replay=replay, speedup=speedup, trace=traced)
    limits = limits_of_options(max_ttft_s, max_tpot_s)
    if not arrivals.is_open_loop and requests is not None and duration_s is not None:
        raise InputError("--requests and --duration-s: give one of them")
    workload = (
        workload_of_options(prompt_tokens=prompt_tokens, output_tokens=output_tokens, trace=traced)
        or made.assumptions.workload
    )
    in_flight = concurrency if arrivals.is_open_loop else concurrency or made.assumptions.concurrency
    if in_flight is None and not arrivals.is_open_loop:
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
            duration_s=duration_s or (None if requests is not None or replay else 30.0),
            arrivals=arrivals,
            trace=traced.requests if replay and traced is not None else (),
            warmup_s=warmup_s,
            limits=limits,
            events=to_happen,
            rig=rig,
            history=None if history is None else history.resolve(),
            adapt=adapt,
            allow_stale=allow_stale,
        )

    for remark in workload.notes:
        note(f"  note: {remark}")
    for written in filter(None, (output, history)):
        require_writable(written)
    run_job(spec, job, log_dir=logs_beside(output))
    show_written(output, as_json=as_json)
