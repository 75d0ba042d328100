"""The command ``check``: judge a history of what clients saw."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from helixbench.options import AsJson, ModelDirectory, print_record


def check(
    history: Annotated[Path, typer.Argument(help="the JSON lines of `bench --history`")],
    model: ModelDirectory,
    as_json: AsJson = False,
) -> None:
    """Judge what clients saw in a run: tokens lost, duplicated or wrong. Exit code 0 where there are none, else 1."""
    from helixbench.profiler.model.hash_model import HashModel
    from helixbench.profiler.model.model import open_model
    from helixbench.reference_server.coordinator.history import judge

    opened = open_model(model)
    verdict = judge(history, opened if isinstance(opened, HashModel) else None)
    if as_json:
        print_record(verdict)
    else:
        wrong = "not compared: the model has no reference" if verdict.wrong is None else str(verdict.wrong)
        print(f"{verdict.requests} requests, {verdict.finished} finished, {verdict.tokens} tokens")
        print(f"  failed {verdict.failed}, unfinished {verdict.unfinished} (in flight when the run ended)")
        print(f"  lost {verdict.lost}, duplicated {verdict.duplicated}, unknown {verdict.unknown}, wrong {wrong}")
        print(f"  longest gap between two tokens of a request {verdict.longest_gap_s:.3g} s")
        print("good" if verdict.is_good else "BAD")
    if not verdict.is_good:
        raise typer.Exit(1)
