"""The command under ``profile`` that needs no running nodes: ``profile import``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from helixbench.options import AsJson, print_record


def profile_commands() -> typer.Typer:
    """A fresh group for ``profile``; the server, which has the nodes, adds what it does without a subcommand."""
    group = typer.Typer(no_args_is_help=True)
    group.command("import")(import_tables)
    return group


def import_tables(
    cluster: Annotated[Path, typer.Argument(help="cluster.json whose nodes have capacity tables")],
    tables: Annotated[Path, typer.Option(help="folder of *_<device>_prompt.csv and *_<device>_decode.csv")],
    output: Annotated[Path, typer.Option("--output", "-o", help="where the cluster goes")],
    max_batch_tokens: Annotated[int, typer.Option(min=8, help="most tokens of one iteration")] = 2048,
    memory_utilization: Annotated[float, typer.Option(help="share of each device's memory that the engine uses")] = 0.9,
    workspace_bytes: Annotated[
        float, typer.Option(help="of that, what is neither weights nor KV cache: CUDA context, activations")
    ] = 3e9,
    as_json: AsJson = False,
) -> None:
    """Give each node a cost fitted to others' timings of one layer (rows `tokens,ms`) instead of its capacity table."""
    from helixbench.profiler.cluster import ClusterProfile
    from helixbench.profiler.import_tables import with_imported_costs
    from helixbench.records import load_record, save_record

    imported = with_imported_costs(
        load_record(cluster, ClusterProfile),
        tables,
        max_batch_tokens=max_batch_tokens,
        memory_utilization=memory_utilization,
        workspace_bytes=workspace_bytes,
    )
    save_record(output, imported)
    where = sys.stderr if as_json else sys.stdout
    if as_json:
        print_record(imported)
    for name, (cost, used_bytes) in {
        node.device.name: (node.cost, node.device.memory_bytes) for node in imported.nodes
    }.items():
        assert cost is not None, "every node got one"
        errors = f"held-out error {cost.held_out_error_median:.1%} median, {cost.held_out_error_p90:.1%} p90"
        left = f"{(used_bytes - workspace_bytes) / 1e9:.1f} GB for weights and KV cache"
        print(f"{name}: {errors}; {left}", file=where)
    print(
        f"assumed: the engine uses {memory_utilization:.0%} of each device's memory (--memory-utilization) and keeps "
        f"{workspace_bytes / 1e9:.3g} GB of it beside weights and KV cache (--workspace-bytes)",
        file=where,
    )
    print(f"cluster written to {output}", file=sys.stderr)
