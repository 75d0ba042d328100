"""The command ``simulate``: parses its options, simulates, writes the run record, prints a summary."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Optional

import typer

from helixbench.errors import InputError
from helixbench.interrupted import Interrupted
from helixbench.options import (
    AsJson,
    Burstiness,
    MaxTpotS,
    MaxTtftS,
    OutputTokens,
    PromptTokens,
    Rate,
    Replay,
    Speedup,
    Trace,
    TraceFormat,
    TraceScale,
    TraceTokenizer,
)

if TYPE_CHECKING:
    from helixbench.reference_server.simulation.simulator import SimulationResult

DEFAULT_DURATION_S = 600.0
DEFAULT_WARMUP_S = 60.0


def mount(app: typer.Typer) -> None:
    """Register the commands."""
    app.command("simulate")(simulate)


def simulate(
    plan: Annotated[Path, typer.Argument(help="The plan to serve.")],
    cluster: Annotated[Path, typer.Option("--cluster", help="The cluster profile, for iteration times and links.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The run record to write.")],
    trace: Trace = None,
    trace_format: TraceFormat = "auto",
    trace_scale: TraceScale = 1.0,
    trace_tokenizer: TraceTokenizer = None,
    prompt_tokens: PromptTokens = None,
    output_tokens: OutputTokens = None,
    offline: Annotated[bool, typer.Option("--offline", help="All requests arrive at the start.")] = False,
    rate: Rate = None,
    burstiness: Burstiness = 1.0,
    replay: Replay = False,
    speedup: Speedup = 1.0,
    max_ttft_s: MaxTtftS = None,
    max_tpot_s: MaxTpotS = None,
    concurrency: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Requests in flight: all the time in a closed loop, else at most."),
    ] = None,
    duration_s: Annotated[Optional[float], typer.Option("--duration-s", help="Length of the window (600).")] = None,  # noqa: UP045
    warmup_s: Annotated[Optional[float], typer.Option("--warmup-s", help="Warm-up before the window (60).")] = None,  # noqa: UP045
    requests: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Requests in the window of a closed loop; with other arrivals, requests in all."),
    ] = None,
    routing: Annotated[
        Literal["iwrr", "adaptive", "fixed", "random", "shortest-queue", "swarm"],
        typer.Option(help="How pipelines are chosen."),
    ] = "iwrr",
    kv_share: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option("--kv-share", help="Share of each KV cache that admission fills (1; capacity tables 0.8)."),
    ] = None,
    events: Annotated[Path | None, typer.Option(help="TOML or JSON file of what is to happen.")] = None,
    seed: Annotated[int, typer.Option(help="Of lengths, arrival times, iteration times and random routings.")] = 0,
    json_: AsJson = False,
) -> None:
    """Serve a plan on a virtual clock, with the server's rules and the profile's times."""
    from helixbench.profiler.cluster import ClusterProfile
    from helixbench.progress import Reporter
    from helixbench.records import load_record, require_writable, save_measurement
    from helixbench.reference_server.run_log import limits_of_options
    from helixbench.reference_server.simulation.compatibility import require_fit
    from helixbench.reference_server.simulation.config import SimulationConfig
    from helixbench.reference_server.simulation.simulator import simulate as run_simulation
    from helixbench.solver.problem.arrivals import arrivals_of_options
    from helixbench.solver.problem.plan import Plan
    from helixbench.solver.problem.traces import trace_of_options
    from helixbench.solver.problem.workload import workload_of_options
    from helixbench.solver.simulation.events import load_events

    made = load_record(plan, Plan)
    profile = load_record(cluster, ClusterProfile)
    traced = trace_of_options(
        trace,
        kind=trace_format,
        scale=trace_scale,
        tokenizer=trace_tokenizer,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
    )
    given = workload_of_options(prompt_tokens=prompt_tokens, output_tokens=output_tokens, trace=traced)
    arrivals = arrivals_of_options(
        offline=offline, rate=rate, burstiness=burstiness, replay=replay, speedup=speedup, trace=traced
    )
    if kv_share is not None and not 0 < kv_share <= 1:
        raise InputError(f"--kv-share {kv_share}: need more than 0 and at most 1")
    is_closed = arrivals.kind == "closed loop"
    if is_closed and requests is not None and duration_s is not None:
        raise InputError("--requests and --duration-s: give one of them in a closed loop")
    config = SimulationConfig(
        workload=given or made.assumptions.workload,
        arrivals=arrivals,
        trace=traced.requests if replay and traced else (),
        routing=routing,
        seed=seed,
        concurrency=(concurrency or made.assumptions.concurrency) if is_closed else concurrency,
        num_requests=requests,
        duration_s=DEFAULT_DURATION_S if duration_s is None and requests is None else duration_s,
        warmup_s=(0.0 if requests is not None else DEFAULT_WARMUP_S) if warmup_s is None else warmup_s,
        kv_share=kv_share,
        events=load_events(events) if events is not None else (),
        limits=limits_of_options(max_ttft_s, max_tpot_s),
    )
    require_fit(
        made, profile, config, plan_file=str(plan), cluster_file=str(cluster), events_file=str(events or "events")
    )
    require_writable(output)
    began = time.process_time()
    with Reporter() as reporter:
        result = run_simulation(
            made,
            profile,
            config,
            on_progress=lambda done, total: reporter.update("simulating", min(done, total), total),
            is_interrupted=Interrupted(),
        )
    save_measurement(output, result.run)
    if json_:
        sys.stdout.write(output.read_text(encoding="utf-8"))
    for line in _lines(result, output, seconds=time.process_time() - began):
        print(line, file=sys.stderr if json_ else sys.stdout)


def _lines(result: SimulationResult, output: Path, *, seconds: float) -> list[str]:
    """The run in a few lines."""
    run = result.run
    lines = [
        f"SIMULATED (no hardware ran): {run.total_tokens_per_s:.1f} tokens/s in all, "
        f"{run.output_tokens_per_s:.1f} output tokens/s",
        f"  {run.arrivals}, up to {run.concurrency} in flight, routing {run.routing}, {run.window.seconds:.4g} s",
    ]
    for kind in ("ttft", "tpot"):
        percentiles = run.latency_percentiles("ttft" if kind == "ttft" else "tpot", (50, 90, 99))
        if percentiles is not None:
            p50_s, p90_s, p99_s = percentiles
            lines.append(f"  {kind.upper()} p50 {p50_s:.4g} s, p90 {p90_s:.4g} s, p99 {p99_s:.4g} s")
    if run.limits is not None:
        lines.append(f"  goodput {run.goodput_per_s:.4g} requests/s within {run.limits}")
    lines += [f"  note: {remark}" for remark in (*run.workload.notes, *result.remarks)]
    if run.cut_short:
        lines.append(f"  cut short: {run.cut_short}")
    lines.append(f"  {result.num_events} events in {seconds:.3g} CPU s ({result.num_events / seconds:.0f} events/s)")
    lines.append(f"{output} written; see it with: helixbench report {output}")
    return lines
