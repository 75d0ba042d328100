"""Mounts the commands that need nodes, and ``model make``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from helixbench.errors import InputError
from helixbench.profiler.cli import profile_commands
from helixbench.reference_server.commands.agent import agent
from helixbench.reference_server.commands.bench import bench
from helixbench.reference_server.commands.check import check
from helixbench.reference_server.commands.cluster import drain, status
from helixbench.reference_server.commands.doctor import doctor
from helixbench.reference_server.commands.profile import profile
from helixbench.reference_server.commands.serve import serve
from helixbench.solver.cli import cluster_commands


def mount(app: typer.Typer) -> None:
    """Register the commands."""
    model = typer.Typer(help="Make models to try things with.", no_args_is_help=True)
    model.command("make")(model_make)
    app.add_typer(model, name="model")
    cluster = cluster_commands()
    cluster.command("status")(status)
    cluster.command("drain")(drain)
    app.add_typer(cluster, name="cluster")
    profiling = profile_commands()
    profiling.callback(invoke_without_command=True, no_args_is_help=True)(profile)
    app.add_typer(profiling, name="profile")
    for command in (bench, check, serve, agent, doctor):
        app.command()(command)


def model_make(
    directory: Annotated[Path, typer.Argument(help="folder to write")],
    preset: Annotated[str | None, typer.Option(help="a small real model; default: tiny")] = None,
    seed: Annotated[int, typer.Option(help="of the random weights")] = 0,
    like: Annotated[
        str | None, typer.Option(metavar="MODEL", help="a hash model with the sizes of llama2-70b, llama3-8b, ...")
    ] = None,
    layers: Annotated[int | None, typer.Option(help="with --like: number of layers; default: all")] = None,
    wire: Annotated[
        Literal["full", "small"],
        typer.Option(help="with --like: send hidden states in full size, or 8 bytes of them"),
    ] = "full",
) -> None:
    """Write a model: a small Hugging Face one with random weights, or (--like) a hash model of a published size."""
    from helixbench.profiler.model.hash_model import make_hash_model
    from helixbench.profiler.model.synthetic import make_model

    if like is None:
        if layers is not None or wire != "full":
            raise InputError("--layers and --wire: only with --like MODEL")
        make_model(directory, preset=preset or "tiny", seed=seed)
        print(f"{directory}: model {preset or 'tiny'}, seed {seed}")
        return
    if preset is not None or seed:
        raise InputError("--preset and --seed: not with --like, whose models have no weights")
    made = make_hash_model(directory, like=like, num_layers=layers, wire=wire)
    facts = made.facts(dtype=made.saved_dtype)
    print(
        f"{directory}: hash model of {facts.num_layers} layers like {like}; per layer "
        f"{facts.layer_weight_bytes / 1e6:.0f} MB of weights and {facts.kv_bytes_per_token_per_layer:.0f} bytes of KV "
        f"cache per token, {facts.activation_bytes_per_token:.0f} bytes per token between nodes"
    )
