"""Mounts the commands that need nodes, and ``model make``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from helixbench.profiler.cli import profile_commands
from helixbench.reference_server.commands.agent import agent
from helixbench.reference_server.commands.bench import bench
from helixbench.reference_server.commands.doctor import doctor
from helixbench.reference_server.commands.profile import profile
from helixbench.reference_server.commands.serve import serve


def mount(app: typer.Typer) -> None:
    """Register the commands."""
    model = typer.Typer(help="Make models to try things with.", no_args_is_help=True)
    model.command("make")(model_make)
    app.add_typer(model, name="model")
    profiling = profile_commands()
    profiling.callback(invoke_without_command=True, no_args_is_help=True)(profile)
    app.add_typer(profiling, name="profile")
    for command in (bench, serve, agent, doctor):
        app.command()(command)


def model_make(
    directory: Annotated[Path, typer.Argument(help="folder to write")],
    preset: Annotated[str, typer.Option(help="which model")] = "tiny",
    seed: Annotated[int, typer.Option(help="of the random weights")] = 0,
) -> None:
    """Write a small Hugging Face model with seeded random weights."""
    from helixbench.profiler.model.synthetic import make_model

    make_model(directory, preset=preset, seed=seed)
    print(f"{directory}: model {preset}, seed {seed}")
