"""Commands that need nodes: profile, bench, serve, agent, doctor; and ``model make``."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Optional

import typer

from helixbench.errors import InputError
from helixbench.options import AsJson, OutputTokens, PromptTokens, Trace, TraceScale
from helixbench.profiler.cli import DEFAULT_COMMAND, profile_commands
from helixbench.reference_server.http.options import HttpOptions
from helixbench.reference_server.profiling.node_cli import profile_node_command

if TYPE_CHECKING:
    from rich.console import Console

    from helixbench.reference_server.doctor import Diagnosis
    from helixbench.reference_server.jobs.job import Job
    from helixbench.reference_server.testbed.testbed import Testbed

ModelOption = Annotated[str, typer.Option("--model", help="Hugging Face model directory or hub id.")]
TestbedOption = Annotated[
    Optional[Path],  # noqa: UP045 - typer reads it
    typer.Option("--testbed", help="Testbed TOML: nodes and links. Default: the demo's four nodes."),
]
StaleOption = Annotated[
    bool, typer.Option("--allow-stale", help="Also where the profile was made on another device, version or model.")
]
ThreadsOption = Annotated[
    int | None, typer.Option(min=1, help="Threads that compute on a CPU. Default: one for each core.")
]
CpusOption = Annotated[str, typer.Option(help="Cores to run on, like 0,2-3. Default: any.")]

_HTTP = HttpOptions()


def mount(app: typer.Typer) -> None:
    """Register the commands."""
    model = typer.Typer(help="Make models to try things with.", no_args_is_help=True)
    model.command("make")(model_make)
    app.add_typer(model, name="model")
    profiling = profile_commands()
    profiling.command(DEFAULT_COMMAND)(profile)
    profiling.command("node")(profile_node_command)
    app.add_typer(profiling, name="profile")
    app.command("bench")(bench)
    app.command("serve")(serve)
    app.command("agent")(agent)
    app.command("doctor")(doctor)


def model_make(
    directory: Annotated[Path, typer.Argument(help="Where to write it.")],
    preset: Annotated[str, typer.Option(help="Which model.")] = "tiny",
    seed: Annotated[int, typer.Option(help="Of the random weights.")] = 0,
) -> None:
    """Write a small Hugging Face model with seeded random weights."""
    from helixbench.profiler.model.synthetic import make_model

    make_model(directory, preset=preset, seed=seed)
    print(f"{directory}: model {preset}, seed {seed}")


def profile(
    model: ModelOption,
    output: Annotated[Path, typer.Option("--output", "-o", help="The cluster profile to write.")],
    testbed: TestbedOption = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    max_batch_tokens: Annotated[int, typer.Option(min=8, help="Tokens of one iteration at most.")] = 128,
    max_context_tokens: Annotated[int, typer.Option(min=32, help="Longest context to measure.")] = 512,
    budget_s: Annotated[float, typer.Option("--budget-s", min=1, help="Seconds to measure each node.")] = 100.0,
    only: Annotated[
        Literal["network"] | None, typer.Option(help="network: measure links and NICs, but no compute.")
    ] = None,
    compute_of: Annotated[
        Path | None, typer.Option(help="With --only network: the cluster profile whose compute is kept.")
    ] = None,
    link_seconds: Annotated[float, typer.Option(min=1, help="Seconds of bandwidth per attempt at a link.")] = 1.0,
    one_pair_at_a_time: Annotated[
        bool, typer.Option("--one-pair-at-a-time", help="For networks in which pairs share more than NICs.")
    ] = False,
    json_: AsJson = False,
) -> None:
    """Measure nodes and links into a cluster profile."""
    from helixbench.profiler.model.dtypes import resolve_dtype
    from helixbench.profiler.model.files import ModelFiles
    from helixbench.records import command_line
    from helixbench.reference_server.jobs.job import ProfileJob
    from helixbench.reference_server.profiling.config import NetworkConfig, ProfileConfig
    from helixbench.reference_server.testbed.spec import load_testbed

    testbed_file = testbed or _demo_testbed()
    spec = load_testbed(testbed_file)
    files = ModelFiles(model)
    named_dtype = resolve_dtype(dtype, files.saved_dtype)
    limited = [node.name for node in spec.local_nodes if node.bandwidth_bytes_per_s is not None]
    if spec.coordinator_bandwidth_bytes_per_s is not None:
        limited.append("coordinator")

    def job(bed: Testbed) -> Job:
        return ProfileJob(
            config=ProfileConfig(
                model=str(files.directory),
                dtype=named_dtype,
                addresses=dict(bed.addresses),
                key_file=bed.key_file,
                output=output.resolve(),
                testbed=bed.description,
                limited_nics=tuple(limited) if bed.isolated else (),
                command=command_line(),
                regions=spec.regions,
                max_batch_tokens=max_batch_tokens,
                max_context_tokens=max_context_tokens,
                budget_s=budget_s,
                network=NetworkConfig(seconds=link_seconds, one_pair_at_a_time=one_pair_at_a_time),
                is_network_only=only == "network",
                compute_of=None if compute_of is None else compute_of.resolve(),
            )
        )

    _drive(testbed_file, job, log_dir=_logs_beside(output))
    _show_file(output, json_)


def bench(
    plan: Annotated[Path, typer.Argument(help="The plan to run.")],
    model: ModelOption,
    output: Annotated[Path, typer.Option("--output", "-o", help="The run log to write.")],
    testbed: TestbedOption = None,
    concurrency: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Requests in flight. Default: as the plan assumes."),
    ] = None,
    requests: Annotated[Optional[int], typer.Option(min=1, help="Measure until so many have finished.")] = None,  # noqa: UP045
    duration_s: Annotated[Optional[float], typer.Option("--duration-s", min=1, help="Measure so long.")] = None,  # noqa: UP045
    prompt_tokens: PromptTokens = None,
    output_tokens: OutputTokens = None,
    trace: Trace = None,
    trace_scale: TraceScale = 1.0,
    routing: Annotated[
        Literal["iwrr", "fixed", "random", "shortest-queue"], typer.Option(help="How pipelines are chosen.")
    ] = "iwrr",
    seed: Annotated[int, typer.Option(help="Of prompts and of the order of lengths.")] = 0,
    allow_stale: StaleOption = False,
    json_: AsJson = False,
) -> None:
    """Serve a plan under closed-loop load and record what it did."""
    from helixbench.profiler.model.files import resolve_model
    from helixbench.records import command_line, load_record
    from helixbench.reference_server.jobs.job import BenchJob
    from helixbench.solver.problem.plan import Plan
    from helixbench.solver.problem.workload import workload_of_options

    made = load_record(plan, Plan)
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

    directory = str(resolve_model(model))  # here, where a hub can be reached: a testbed's namespaces reach nothing

    def job(bed: Testbed) -> Job:
        return BenchJob(
            command=command_line(),
            plan=plan.resolve(),
            model=directory,
            addresses=dict(bed.addresses),
            key_file=bed.key_file,
            testbed=bed.description,
            output=output.resolve(),
            workload=workload,
            concurrency=in_flight,
            routing=routing,
            seed=seed,
            num_requests=requests,
            duration_s=None if requests is not None else duration_s or 30.0,
            allow_stale=allow_stale,
        )

    _drive(testbed or _demo_testbed(), job, log_dir=_logs_beside(output))
    _show_file(output, json_)


def serve(
    plan: Annotated[Path, typer.Argument(help="The plan to serve.")],
    model: ModelOption,
    testbed: TestbedOption = None,
    host: Annotated[str, typer.Option(help="IPv4 or IPv6 address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 for any.")] = 8000,
    served_model_name: Annotated[
        Optional[list[str]],  # noqa: UP045 - typer reads it
        typer.Option(help="Name that clients ask for; may be given several times. Default: the hub id or directory."),
    ] = None,
    api_key: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(envvar="HELIXBENCH_API_KEY", help="Require this bearer token; may be given several times."),
    ] = None,
    cors_origin: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help="Let web pages of this origin call the server (* for any); may be given several times."),
    ] = None,
    max_prompts: Annotated[int, typer.Option(min=1, help="Prompts of one request, times its n.")] = _HTTP.max_prompts,
    max_stops: Annotated[int, typer.Option(min=1, help="Stop strings of one request.")] = _HTTP.max_stops,
    max_waiting: Annotated[
        int, typer.Option(min=1, help="Requests that wait for KV slots; more get 429.")
    ] = _HTTP.max_waiting,
    max_waiting_tokens: Annotated[
        int, typer.Option(min=1, help="Prompt tokens of those that wait.")
    ] = _HTTP.max_waiting_tokens,
    max_connections: Annotated[int, typer.Option(min=1, help="Open connections.")] = _HTTP.max_connections,
    max_body_bytes: Annotated[int, typer.Option(min=1, help="Size of a request's body.")] = _HTTP.max_body_bytes,
    request_timeout_s: Annotated[
        float, typer.Option("--request-timeout-s", min=0.1, help="Time to send a whole request.")
    ] = _HTTP.request_timeout_s,
    stall_timeout_s: Annotated[
        float, typer.Option("--stall-timeout-s", min=0.1, help="Time that a client may take nothing of its answer.")
    ] = _HTTP.stall_timeout_s,
    allow_stale: StaleOption = False,
) -> None:
    """Serve a plan over an OpenAI-compatible HTTP API."""
    from helixbench.profiler.model.files import resolve_model
    from helixbench.records import load_record
    from helixbench.reference_server.http.connection import open_listener, url_of
    from helixbench.reference_server.jobs.job import ServeJob
    from helixbench.solver.problem.plan import Plan

    load_record(plan, Plan)  # refused now rather than once all agents have started
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
        )
    except ValueError as error:
        raise InputError(f"serve: {error}") from error
    # Bound here, before the driver enters the coordinator's namespace: a socket stays in the namespace it was made in.
    listener = open_listener(host, port)
    with listener, tempfile.TemporaryDirectory(prefix="helixbench-") as logs:

        def job(bed: Testbed) -> Job:
            return ServeJob(
                plan=plan.resolve(),
                model=str(directory),
                addresses=dict(bed.addresses),
                key_file=bed.key_file,
                testbed=bed.description,
                socket_fd=listener.fileno(),
                url=url_of(listener, host),
                http=options,
                allow_stale=allow_stale,
            )

        _drive(testbed or _demo_testbed(), job, log_dir=Path(logs), pass_fds=(listener.fileno(),))


def agent(
    listen: Annotated[str, typer.Option(help="HOST:PORT; port 0 for any.")] = "",
    key: Annotated[Optional[Path], typer.Option(help="The cluster's key file.")] = None,  # noqa: UP045
    device: Annotated[str, typer.Option(help="cpu or cuda:N.")] = "cpu",
    memory: Annotated[
        str, typer.Option(help="For weights, workspace and KV cache, e.g. 20GB (a bare number: bytes). Default: all.")
    ] = "",
    threads: ThreadsOption = None,
    cpus: CpusOption = "",
    make_key: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Write a new cluster key there and end."),
    ] = None,
) -> None:
    """Run the agent of one node, to be profiled and to serve."""
    from helixbench.reference_server.wire.keys import make_key_file
    from helixbench.reference_server.wire.transport import require_listen
    from helixbench.units import parse_bytes

    if make_key is not None:
        make_key_file(make_key)
        print(f"{make_key}: a new cluster key; copy it to every node")
        return
    if not listen or key is None:
        raise InputError("agent: need --listen HOST:PORT and --key FILE (make one with --make-key FILE)")
    require_listen(listen)
    try:
        memory_bytes = None if not memory else float(memory) if memory.isdigit() else parse_bytes(memory)
    except ValueError as error:
        raise InputError(f"--memory {memory}: {error}") from error
    from helixbench.reference_server.node.agent import AgentConfig, run_agent
    from helixbench.reference_server.testbed.cpu import parse_cpus

    config = AgentConfig(
        listen=listen, key=key, device=device, memory_bytes=memory_bytes, threads=threads, cpus=parse_cpus(cpus)
    )
    run_agent(config)


def doctor(
    agent: Annotated[
        list[str] | None,
        typer.Option("--agent", help="NAME=HOST:PORT of an agent to check instead; repeat for each, with --key."),
    ] = None,
    key: Annotated[Path | None, typer.Option("--key", help="The key that those agents were started with.")] = None,
    listen: Annotated[str, typer.Option(help="HOST:PORT for an agent on this machine: is it free?")] = "",
    json_: AsJson = False,
) -> None:
    """Check whether nodes are fit to be profiled and to serve. Exit code 1 where there is a problem."""
    import msgspec

    from helixbench.records import encode_record, provenance_now
    from helixbench.reference_server.doctor import diagnose_agents, diagnose_here
    from helixbench.reference_server.wire.transport import require_listen

    if agent and listen:
        raise InputError("--listen is for this machine, --agent for others: give one of them")
    if agent:
        if key is None:
            raise InputError("--agent: give --key FILE with it")
        found = diagnose_agents(parse_agents(agent), key)
    else:
        if listen:
            require_listen(listen)
        found = diagnose_here(listen)
    if json_:
        sys.stdout.write(encode_record(msgspec.structs.replace(found, provenance=provenance_now())).decode())
    else:
        from rich.console import Console

        _show_diagnosis(found, Console())
    if found.count("problem"):
        raise typer.Exit(1)


def parse_agents(texts: list[str]) -> dict[str, str]:
    """Node -> address, from ``NAME=HOST:PORT`` texts.

    Raises:
        InputError: another form, or a duplicate name.
    """
    from helixbench.reference_server.wire.transport import require_address

    addresses: dict[str, str] = {}
    for text in texts:
        name, _, address = text.partition("=")
        try:
            require_address(address)
        except ValueError as error:
            raise InputError(f"--agent {text}: need NAME=HOST:PORT ({error})") from error
        if not name or name in addresses:
            raise InputError(f"--agent {text}: {'duplicate name ' + repr(name) if name else 'need NAME=HOST:PORT'}")
        addresses[name] = address
    return addresses


def _show_diagnosis(found: Diagnosis, console: Console) -> None:
    from rich.markup import escape
    from rich.table import Table

    marks = {"ok": "[green]ok[/]", "warning": "[yellow]warning[/]", "problem": "[red]PROBLEM[/]"}
    for node, findings in found.findings.items():
        host = f" ({found.facts[node].machine.get('host', '')})" if node in found.facts else ""
        table = Table(title=f"{node}{host}", title_justify="left", box=None, padding=(0, 1, 0, 0), show_header=False)
        for can_wrap in (False, False, True):
            table.add_column(no_wrap=not can_wrap)
        for finding in findings:
            remedy = f"\n[dim]-> {escape(finding.remedy)}[/]" if finding.remedy else ""
            table.add_row(marks[finding.state], finding.check, escape(finding.says) + remedy)
        console.print(table, highlight=False)
    console.print(f"{found.count('problem')} problems, {found.count('warning')} warnings")


def _drive(testbed: Path, job: Callable[[Testbed], Job], *, log_dir: Path, pass_fds: tuple[int, ...] = ()) -> None:
    """Start the testbed, let its driver do the job, and end with the driver's exit code where that is not 0."""
    from helixbench.reference_server.jobs.job import encode_job
    from helixbench.reference_server.testbed.spec import load_testbed
    from helixbench.reference_server.testbed.testbed import start_testbed

    spec = load_testbed(testbed)
    with start_testbed(spec, log_dir=log_dir) as bed, tempfile.TemporaryDirectory(prefix="helixbench-") as folder:
        print(f"  testbed: {bed.description}", file=sys.stderr)
        job_file = Path(folder) / "job.json"
        job_file.write_bytes(encode_job(job(bed)))
        code = bed.run_driver(
            [sys.executable, "-m", "helixbench.reference_server.jobs.driver", str(job_file)], pass_fds
        )
        if code != 0:
            bed.check()
            raise typer.Exit(code)


def _demo_testbed() -> Path:
    return Path(str(resources.files("helixbench.reference_server.testbed") / "demo.toml"))


def _logs_beside(output: Path) -> Path:
    return output.resolve().parent / "logs"


def _show_file(path: Path, is_json: bool) -> None:
    if is_json:
        sys.stdout.write(path.read_text(encoding="utf-8"))
    else:
        print(f"{path} written; see it with: helixbench report {path}")
