"""The command ``serve``: a plan behind an OpenAI-compatible HTTP API."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from helixbench.errors import InputError
from helixbench.options import ModelDirectory
from helixbench.reference_server.commands.nodes import (
    OUTAGE_S,
    AgentsKey,
    AllowStale,
    NoReflow,
    NoReplan,
    OutageS,
    ReplayMemory,
    RunningAgents,
    TakeOver,
    TestbedFile,
    adapt_options,
    nodes_of_options,
    run_job,
)
from helixbench.reference_server.http.options import API_KEY_VARIABLE, HttpOptions

if TYPE_CHECKING:
    from helixbench.reference_server.jobs.job import Job
    from helixbench.reference_server.testbed.testbed import Testbed

_HTTP = HttpOptions()


def serve(
    plan: Annotated[Path, typer.Argument(help="the plan to serve")],
    model: ModelDirectory,
    testbed: TestbedFile = None,
    agent: RunningAgents = None,
    key: AgentsKey = None,
    host: Annotated[str, typer.Option(help="IPv4 or IPv6 address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="port to listen on; 0 for any")] = 8000,
    served_model_name: Annotated[
        list[str] | None, typer.Option(help="name that clients ask for, repeatable; default: the hub id or directory")
    ] = None,
    api_key: Annotated[
        list[str] | None, typer.Option(envvar=API_KEY_VARIABLE, help="require this bearer token; repeatable")
    ] = None,
    cors_origin: Annotated[
        list[str] | None, typer.Option(help="allow web pages of this origin to call the server (* for any); repeatable")
    ] = None,
    max_prompts: Annotated[int, typer.Option(min=1, help="prompts of one request, times its n")] = _HTTP.max_prompts,
    max_stops: Annotated[int, typer.Option(min=1, help="stop strings of one request")] = _HTTP.max_stops,
    max_waiting: Annotated[
        int, typer.Option(min=1, help="requests that wait for KV slots; more get 429")
    ] = _HTTP.max_waiting,
    max_waiting_tokens: Annotated[
        int, typer.Option(min=1, help="prompt tokens of the requests that wait")
    ] = _HTTP.max_waiting_tokens,
    max_connections: Annotated[int, typer.Option(min=1, help="open connections")] = _HTTP.max_connections,
    max_body_bytes: Annotated[int, typer.Option(min=1, help="size of a request's body")] = _HTTP.max_body_bytes,
    request_timeout_s: Annotated[
        float, typer.Option("--request-timeout-s", min=0.1, help="time to send a whole request")
    ] = _HTTP.request_timeout_s,
    stall_timeout_s: Annotated[
        float, typer.Option("--stall-timeout-s", min=0.1, help="time that a client may read nothing of its answer")
    ] = _HTTP.stall_timeout_s,
    drain_s: Annotated[
        float, typer.Option("--drain-s", min=0.1, help="on SIGTERM or Ctrl-C: time for requests in flight to end")
    ] = _HTTP.drain_s,
    log_dir: Annotated[Path, typer.Option("--log-dir", help="folder of the agents' logs")] = Path("logs"),
    ready_file: Annotated[
        Path | None,
        typer.Option("--ready-file", metavar="FILE", help="write URL and model as JSON once the plan is served"),
    ] = None,
    no_reflow: NoReflow = False,
    no_replan: NoReplan = False,
    outage_s: OutageS = OUTAGE_S,
    replay_memory: ReplayMemory = "",
    take_over: TakeOver = False,
    allow_stale: AllowStale = False,
) -> None:
    """Serve a plan over an OpenAI-compatible HTTP API."""
    from helixbench.profiler.model.files import resolve_model
    from helixbench.records import load_record
    from helixbench.reference_server.http.connection import open_listener, url_of
    from helixbench.reference_server.jobs.job import ServeJob
    from helixbench.solver.problem.plan import Plan

    load_record(plan, Plan)  # refused now rather than once all agents have started
    spec = nodes_of_options(testbed, agent, key)
    directory = resolve_model(model)
    try:
        options = HttpOptions(
            model_names=tuple(served_model_name or [directory.name if Path(model).is_dir() else model]),
            api_keys=tuple(api_key or ()),
            cors_origins=tuple(cors_origin or ()),
            max_prompts=max_prompts,
            max_stops=max_stops,
            max_waiting=max_waiting,
            max_waiting_tokens=max_waiting_tokens,
            max_connections=max_connections,
            max_body_bytes=max_body_bytes,
            request_timeout_s=request_timeout_s,
            stall_timeout_s=stall_timeout_s,
            drain_s=drain_s,
        )
    except ValueError as error:
        raise InputError(f"serve: {error}") from error
    adapt = adapt_options(
        spec,
        take_over=take_over,
        outage_s=outage_s,
        replay_memory=replay_memory,
        no_reflow=no_reflow,
        no_replan=no_replan,
    )
    # Bound here, before the driver enters the coordinator's namespace: a socket stays in the namespace it was made in.
    listener = open_listener(host, port)
    with listener:

        def job(bed: Testbed) -> Job:
            return ServeJob(
                plan=plan.resolve(),
                model=str(directory),
                addresses=dict(bed.addresses),
                key_file=bed.key_file,
                testbed=bed.description,
                timing=bed.timing,
                socket_fd=listener.fileno(),
                url=url_of(listener, host),
                http=options,
                adapt=adapt,
                allow_stale=allow_stale,
                ready_file=None if ready_file is None else ready_file.resolve(),
            )

        run_job(spec, job, log_dir=log_dir, pass_fds=(listener.fileno(),))
