"""The command ``profile``: a cluster, its network alone, or this machine's own device."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from helixbench.errors import InputError
from helixbench.interrupted import EXIT_CODE
from helixbench.options import AsJson, DeviceMemory, Threads, memory_of_option, note, print_record
from helixbench.reference_server.commands.nodes import (
    AgentsKey,
    RunningAgents,
    TestbedFile,
    logs_beside,
    nodes_of_options,
    run_job,
    show_written,
)

if TYPE_CHECKING:
    from helixbench.reference_server.jobs.job import Job
    from helixbench.reference_server.profiling.config import NodeProfileConfig
    from helixbench.reference_server.testbed.testbed import Testbed


def profile(
    ctx: typer.Context,
    model: Annotated[str, typer.Option("--model", help="Hugging Face model directory or hub id")] = "",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="the cluster profile to write")] = None,
    testbed: TestbedFile = None,
    agent: RunningAgents = None,
    key: AgentsKey = None,
    device: Annotated[
        str, typer.Option(help="cpu or cuda:N: profile this device of this machine, without a testbed")
    ] = "",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16")] = "auto",
    max_batch_tokens: Annotated[
        int | None, typer.Option(min=8, help="most tokens of one iteration; default 1024 on a GPU, else 128")
    ] = None,
    max_context_tokens: Annotated[
        int | None, typer.Option(min=32, help="longest context to measure; default 4096 on a GPU, else 512")
    ] = None,
    budget_s: Annotated[float, typer.Option("--budget-s", min=0, help="seconds to sample each node")] = 100.0,
    only: Annotated[Literal["network"] | None, typer.Option(help="network: links and NICs, but no compute")] = None,
    compute_of: Annotated[
        Path | None, typer.Option(help="with --only network: the cluster profile whose compute is kept")
    ] = None,
    link_seconds: Annotated[float, typer.Option(min=1, help="seconds of bandwidth per attempt at a link")] = 1.0,
    one_pair_at_a_time: Annotated[
        bool, typer.Option("--one-pair-at-a-time", help="for networks in which pairs share more than NICs")
    ] = False,
    name: Annotated[str, typer.Option(help="with --device: the node's name in the profile")] = "node",
    memory: DeviceMemory = "",
    threads: Threads = None,
    plan_only: Annotated[
        bool, typer.Option("--plan-only", help="with --device: print what would be measured, and for how long")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="with --device: continue an interrupted run of the same command")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Profile nodes and links into a cluster profile.

    With --device, Ctrl-C keeps what was measured and --resume continues.
    """
    if ctx.invoked_subcommand is not None:
        return
    if not model:
        raise InputError("--model is missing; name a Hugging Face model directory or hub id")
    if output is None and not plan_only:
        raise InputError("--output is missing; name the cluster profile to write, like -o cluster.json")
    of_a_device = {"--memory": memory, "--threads": threads, "--plan-only": plan_only, "--resume": resume}
    of_a_cluster = {"--testbed": testbed, "--agent": agent, "--key": key, "--only": only, "--compute-of": compute_of}
    misplaced = [option for option, value in (of_a_cluster if device else of_a_device).items() if value]
    if misplaced:
        raise InputError(f"{misplaced[0]}: {'does not go with' if device else 'goes with'} --device")
    if compute_of is not None and only is None:
        raise InputError("--compute-of: goes with --only network")

    from helixbench.profiler.model.dtypes import resolve_dtype
    from helixbench.profiler.model.model import open_model
    from helixbench.records import command_line, require_writable
    from helixbench.reference_server.jobs.job import ProfileJob
    from helixbench.reference_server.profiling.config import NetworkConfig, NodeProfileConfig, ProfileConfig
    from helixbench.reference_server.testbed.wiring import nic_rates, shaped_links

    files = open_model(model)
    named_dtype = resolve_dtype(dtype, files.saved_dtype)
    if device:
        config = NodeProfileConfig(
            model=str(files.directory),
            dtype=named_dtype,
            name=name,
            device=device,
            memory_bytes=memory_of_option(memory),
            threads=threads,
            max_batch_tokens=max_batch_tokens,
            max_context_tokens=max_context_tokens,
            budget_s=budget_s,
            command=command_line(),
        )
        if output is None or plan_only:
            _show_plan(config, as_json=as_json)
        else:
            _profile_here(config, output, resume=resume, as_json=as_json)
        return
    assert output is not None
    spec = nodes_of_options(testbed, agent, key)

    def job(bed: Testbed) -> Job:
        return ProfileJob(
            config=ProfileConfig(
                model=str(files.directory),
                dtype=named_dtype,
                addresses=dict(bed.addresses),
                key_file=bed.key_file,
                output=output.resolve(),
                testbed=bed.description,
                timing=bed.timing,
                limited_nics=spec.limited_nics if bed.isolated else (),
                command=command_line(),
                regions=spec.regions,
                max_batch_tokens=max_batch_tokens,
                max_context_tokens=max_context_tokens,
                budget_s=budget_s,
                network=NetworkConfig(seconds=link_seconds, one_pair_at_a_time=one_pair_at_a_time),
                is_network_only=only == "network",
                compute_of=None if compute_of is None else compute_of.resolve(),
                shaped_links=shaped_links(spec) if bed.isolated and spec.is_emulated else (),
                shaped_nics=nic_rates(spec),
            )
        )

    require_writable(output)
    run_job(spec, job, log_dir=logs_beside(output))
    show_written(output, as_json=as_json)


def _profile_here(config: NodeProfileConfig, output: Path, *, resume: bool, as_json: bool) -> None:
    from rich.console import Console

    from helixbench.progress import Reporter
    from helixbench.records import require_writable, save_measurement
    from helixbench.reference_server.profiling.local import profile_node
    from helixbench.reference_server.profiling.table import node_table, quality_lines

    require_writable(output)
    partial = output.with_name(output.name + ".partial")
    with Reporter(auto_refresh=False) as reporter:
        try:
            made = profile_node(
                config,
                partial=partial,
                resume=resume,
                on_block=lambda done, expected: reporter.update("blocks", done, expected),
            )
        except KeyboardInterrupt:
            kept = f"what was measured is in {partial}; continue with --resume" if partial.exists() else "nothing kept"
            note(f"helixbench: interrupted; {kept}")
            raise typer.Exit(EXIT_CODE) from None
    save_measurement(output, made)
    if as_json:
        print_record(made)
    else:
        Console().print(node_table(made))
        print("\n".join(quality_lines(made.nodes[0])))
    note(f"{output} written; see it with: helixbench report {output}")


def _show_plan(config: NodeProfileConfig, *, as_json: bool) -> None:
    import msgspec

    from helixbench.reference_server.profiling.local import plan_node

    times = plan_node(config)
    if as_json:
        print(msgspec.json.encode(times).decode())
        return
    print(
        f"{times.num_points} points ({times.num_held_out} held out), {times.num_layers} layers held, "
        f"{times.num_rounds} rounds in about {times.least_s:.0f} s after {times.prepare_s:.0f} s to prepare; then "
        f"noisy points again until {times.budget_s:.0f} s are used"
    )
