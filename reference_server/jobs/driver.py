"""The process that acts as the coordinator: reads a job file, connects to the agents, does the job.

``python -m helixbench.reference_server.jobs.driver JOB.json``; exit codes as the command line's.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from helixbench.errors import HelixbenchError, InputError, MeasurementError
from helixbench.interrupted import EXIT_CODE, Interrupted
from helixbench.profiler.model.hash_model import HashModel
from helixbench.profiler.model.model import Model, open_model
from helixbench.profiler.staleness import identity_of, stale_parts
from helixbench.progress import Reporter
from helixbench.records import digest, load_record, provenance_now, save_measurement, save_record
from helixbench.reference_server.coordinator.bench import BenchResult, run_bench
from helixbench.reference_server.coordinator.bench_load import BenchConfig
from helixbench.reference_server.coordinator.effects import with_predictions
from helixbench.reference_server.coordinator.engine import Engine
from helixbench.reference_server.coordinator.history import history_to
from helixbench.reference_server.coordinator.live_events import LiveEvents
from helixbench.reference_server.coordinator.loading import load_plan
from helixbench.reference_server.coordinator.outputs import check_outputs
from helixbench.reference_server.jobs.job import BenchJob, Job, ProfileJob, ServeJob, Serving, decode_job
from helixbench.reference_server.profiling.cluster import profile_cluster
from helixbench.reference_server.run_log import OutputCheck, RunLog
from helixbench.reference_server.simulation.config import SimulationConfig
from helixbench.reference_server.simulation.promise import promise
from helixbench.reference_server.testbed.emulation import require_time_scale
from helixbench.reference_server.wire.client import Agents
from helixbench.reference_server.wire.keys import load_key_file
from helixbench.reference_server.wire.messages import Description
from helixbench.solver.problem.plan import Expected, Plan

if TYPE_CHECKING:
    from helixbench.reference_server.http.text import TokenizerLike


def open_plan(path: Path, model: str, addresses: dict[str, str], *, allow_stale: bool = False) -> tuple[Plan, Model]:
    """Load a plan and its model, and check them against each other and against the testbed.

    With ``allow_stale`` any model with the same number of layers is accepted; see ``stale_parts_of``.

    Raises:
        InputError: another model, or a node that the testbed does not have.
    """
    plan = load_record(path, Plan)
    files = open_model(model)
    is_other = plan.model_digest != files.digest() and not allow_stale
    if plan.num_layers != files.num_layers or is_other:
        raise InputError(
            f"{path}: made for model {plan.model} ({plan.num_layers} layers, {plan.model_digest or 'no digest'}), but "
            f"--model {model} has {files.num_layers} layers and {files.digest()}; profile and solve for this model"
        )
    missing = sorted(set(plan.placement) - set(addresses))
    if missing:
        raise InputError(
            f"{path}: placement names {', '.join(missing)}, which the testbed does not have "
            f"(it has {', '.join(addresses)}); use the testbed that was profiled"
        )
    return plan, files


def stale_parts_of(
    plan: Plan, files: Model, described: Mapping[str, Description], *, allow_stale: bool
) -> tuple[str, ...]:
    """Differences between the profile behind the plan and the current devices, versions and model, one line each.

    Raises:
        InputError: there are differences, and ``allow_stale`` is not set.
    """
    lines = stale_parts(
        {name: node.made_on for name, node in plan.nodes.items()},
        {name: identity_of(answer.device, answer.versions) for name, answer in described.items()},
    )
    if plan.model_digest != files.digest():
        lines = (f"model: {plan.model_digest} -> {files.digest()}", *lines)
    if lines and not allow_stale:
        raise InputError(
            "the plan's profile is stale, differing from the current environment in:\n  "
            + "\n  ".join(lines)
            + "\nProfile and solve again, or pass --allow-stale, which every output will mention."
        )
    return lines


class Ready(NamedTuple):
    """A plan loaded onto its agents. ``stale`` as ``stale_parts_of`` returns it; the tokenizer is for serving alone."""

    plan: Plan
    files: Model
    engine: Engine
    device_names: dict[str, str]
    emulated: tuple[str, ...]
    stale: tuple[str, ...]
    tokenizer: TokenizerLike | None


@contextmanager
def plan_on_agents(job: BenchJob | ServeJob, reporter: Reporter) -> Iterator[Ready]:
    """Connect to the nodes of the job's plan and load it.

    Raises:
        InputError: plan, model and testbed do not match, or an agent does not answer.
    """
    plan, files = open_plan(job.plan, job.model, job.addresses, allow_stale=job.allow_stale)
    tokenizer = None
    if isinstance(job, ServeJob):  # its files may be broken, and loading weights takes minutes
        from helixbench.reference_server.http.server import load_tokenizer

        tokenizer = load_tokenizer(files)
    used = {node: address for node, address in job.addresses.items() if node in plan.placement}
    with Agents(used, load_key_file(job.key_file)) as agents:
        described = agents.describe()
        stale = stale_parts_of(plan, files, described, allow_stale=job.allow_stale)
        for line in stale:
            reporter.say(f"stale profile: {line}")
        require_time_scale(described, job.timing)
        if isinstance(job, BenchJob):
            engine = load_plan(
                agents,
                plan,
                files,
                routing=job.routing,
                seed=job.seed,
                max_concurrency=job.concurrency if job.arrivals.is_open_loop else None,
                timing=job.timing,
                options=job.adapt,
            )
        else:
            engine = load_plan(agents, plan, files, timing=job.timing, options=job.adapt)
        emulated = tuple(node for node in used if described[node].device.kind == "emulated")
        engine.is_emulated = bool(emulated)
        names = {node: answer.device.label for node, answer in described.items()}
        names |= {node: plan.nodes[node].device for node in emulated}  # which says where times are from for this model
        try:
            yield Ready(plan, files, engine, names, emulated, stale, tokenizer)
        finally:
            engine.release()


def run_profile(job: ProfileJob, reporter: Reporter) -> None:
    """Profile the cluster, or its network alone, into the job's output file."""
    profile_cluster(job.config, load_key_file(job.config.key_file), reporter)


def run_bench_job(job: BenchJob, reporter: Reporter) -> None:
    """Run the plan under load and write the run log.

    Raises:
        InputError: plan, model and testbed do not match, or a request is longer than any pipeline can hold.
        MeasurementError: an agent failed, or the run was interrupted before anything was measured.
    """
    interrupted = Interrupted()
    promised = _promise(job, reporter, interrupted) if job.arrivals.is_open_loop else None
    with plan_on_agents(job, reporter) as ready:
        largest = ready.engine.coordinator.largest_request_tokens()
        if job.workload.max_kv_tokens - 1 > largest:
            raise InputError(
                f"the workload's longest request needs {job.workload.max_kv_tokens - 1} KV slots; "
                f"the plan's pipelines hold {largest} at most: use shorter requests, or solve for this workload"
            )
        config = BenchConfig(
            workload=job.workload,
            concurrency=job.concurrency,
            seed=job.seed,
            vocab_size=ready.files.vocab_size,
            keep_outputs=isinstance(ready.files, HashModel),
            arrivals=job.arrivals,
            trace=job.trace,
            num_requests=job.num_requests,
            duration_s=job.duration_s,
            warmup_s=job.warmup_s,
        )
        events = LiveEvents(job.events, job.rig, set_speed=ready.engine.set_speed, drain=ready.engine.drain)
        try:
            with history_to(job.history) as history:
                result = run_bench(
                    ready.engine,
                    config,
                    on_progress=reporter.update,
                    is_interrupted=interrupted,
                    events=events,
                    history=history,
                )
        finally:
            events.end()
    if result.adaptation.events and ready.plan.cluster is not None:
        reporter.say("computing what is expected after each event")
        adaptation = with_predictions(result.adaptation, ready.plan, ready.plan.cluster, job.concurrency)
        result = msgspec.structs.replace(result, adaptation=adaptation)
    checked = check_outputs(ready.files, result) if isinstance(ready.files, HashModel) else None
    save_measurement(job.output, _run_log(job, ready, result, checked, promised))
    if result.cut_short:
        reporter.say(f"{result.cut_short}; what was measured until then is in {job.output}")
    if result.failed_requests:
        raise MeasurementError(
            f"{result.failed_requests} requests ended with an error, because the nodes that are left do not cover the "
            f"model; {job.output} holds what was measured until then"
        )
    if checked is not None:
        if checked.differing:
            raise MeasurementError(f"{checked.statement}: a fault of the server; {job.output} holds the run")
        reporter.say(checked.statement)


def _promise(job: BenchJob, reporter: Reporter, interrupted: Interrupted) -> Expected | None:
    """What the plan promises for the job's arrivals; it is made before anything is measured."""
    config = SimulationConfig(
        workload=job.workload,
        arrivals=job.arrivals,
        trace=job.trace,
        routing=job.routing,
        seed=job.seed,
        concurrency=job.concurrency,
        num_requests=job.num_requests,
        duration_s=job.duration_s,
        warmup_s=job.warmup_s,
        limits=job.limits,
    )
    return promise(
        load_record(job.plan, Plan),
        config,
        on_progress=lambda done, total: reporter.update("simulating these arrivals", min(done, total), total),
        is_interrupted=interrupted,
    )


def _run_log(
    job: BenchJob, ready: Ready, result: BenchResult, checked: OutputCheck | None, promised: Expected | None
) -> RunLog:
    is_open = job.arrivals.is_open_loop
    return RunLog(
        plan=ready.plan,
        workload=job.workload,
        concurrency=max(1, result.peak_in_flight) if is_open else job.concurrency or result.peak_in_flight,
        arrivals=str(job.arrivals),
        is_limited=is_open and (job.concurrency is not None or job.num_requests is not None),
        promised=promised,
        limits=job.limits,
        routing=job.routing,
        seed=job.seed,
        window=result.window,
        prompt_tokens=result.prompt_tokens,
        output_tokens=result.output_tokens,
        requests=result.requests,
        pipelines=tuple(tuple((hop.node, hop.start, hop.end) for hop in p) for p in ready.engine.pipelines),
        nodes=result.nodes,
        links=result.links,
        timeline=result.timeline,
        node_timeline=result.node_timeline,
        device_names=ready.device_names,
        emulated=ready.emulated,
        time_scale=job.timing.time_scale,
        regions={node: use.region for node, use in ready.plan.nodes.items() if use.region},
        testbed=job.testbed,
        stale=ready.stale,
        cut_short=result.cut_short,
        adaptation=result.adaptation,
        failed_requests=result.failed_requests,
        output_check=checked,
        provenance=provenance_now(inputs={"plan": digest(ready.plan)}, command=job.command),
    )


def run_serve(job: ServeJob, reporter: Reporter) -> None:
    """Serve HTTP until a signal comes.

    Raises:
        InputError: plan, model and testbed do not match.
        MeasurementError: an agent died.
    """
    from helixbench.reference_server.http.server import serve_http

    with plan_on_agents(job, reporter) as ready:
        reporter.say(job.testbed)

        def say_serving() -> None:
            reporter.say(f"serving {ready.plan.model} on {job.url} (OpenAI-compatible: {job.url}/v1); Ctrl-C ends it")
            if job.ready_file is not None:
                model = (*job.http.model_names, ready.files.directory.name)[0]
                save_record(job.ready_file, Serving(url=job.url, model=model))

        assert ready.tokenizer is not None, "a job that serves"
        serve_http(
            ready.engine,
            ready.files,
            ready.tokenizer,
            socket_fd=job.socket_fd,
            options=job.http,
            on_ready=say_serving,
        )


def main(arguments: list[str]) -> int:
    """Do the job in that file and return the exit code; an error is one message on stderr."""
    job = decode_job(Path(arguments[0]).read_bytes())
    try:
        with Reporter() as reporter:
            _run(job, reporter)
    except HelixbenchError as error:
        print(f"helixbench: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("helixbench: interrupted; nothing was written", file=sys.stderr)
        return EXIT_CODE
    return 0


def _run(job: Job, reporter: Reporter) -> None:
    if isinstance(job, ProfileJob):
        run_profile(job, reporter)
    elif isinstance(job, BenchJob):
        run_bench_job(job, reporter)
    else:
        run_serve(job, reporter)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
