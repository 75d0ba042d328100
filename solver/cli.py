"""The solver's commands: ``solve``. Parses, calls one function, prints."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .progress import OnProgress, Progress
    from .workload import Workload

DEFAULT_PROMPT_TOKENS = 512
DEFAULT_OUTPUT_TOKENS = 128
"""Of the workload that is planned for when none is given; the summary says which it was."""


def mount(app: typer.Typer) -> None:
    """Register the solver's commands."""
    app.command()(solve)


def solve(
    cluster: Annotated[Path, typer.Argument(help="cluster.json, as `helixbench profile` writes it")],
    prompt_tokens: Annotated[int | None, typer.Option(help="prompt length of every request (512 unless given)")] = None,
    output_tokens: Annotated[int | None, typer.Option(help="output length of every request (128 unless given)")] = None,
    trace: Annotated[
        Path | None, typer.Option(help="CSV with ContextTokens, GeneratedTokens: lengths of real requests")
    ] = None,
    trace_scale: Annotated[float, typer.Option(help="multiply the trace's lengths by this")] = 1.0,
    concurrency: Annotated[
        int | None, typer.Option(help="requests in flight; without it as many as the KV caches hold")
    ] = None,
    objective: Annotated[
        Literal["throughput", "max-flow"], typer.Option(help="expected tokens/s, or the largest flow")
    ] = "throughput",
    method: Annotated[str, typer.Option(help="auto, petals, swarm, homogeneous or separate")] = "auto",
    time_limit_s: Annotated[float, typer.Option(help="return the best plan by then")] = 60.0,
    threads: Annotated[int, typer.Option(help="threads of the solver")] = 1,
    seed: Annotated[int, typer.Option(help="same input and seed, same plan")] = 0,
    no_partial: Annotated[bool, typer.Option("--no-partial", help="requests enter ranges only at their start")] = False,
    output: Annotated[Path, typer.Option("--output", "-o", help="where the plan goes")] = Path("plan.json"),
    as_json: Annotated[bool, typer.Option("--json", help="print the plan as JSON on stdout")] = False,
) -> None:
    """Plan a model onto a cluster: the best placement in the time given, its proven bound and what to expect."""
    from profiler.cluster_profile import ClusterProfile
    from profiler.records import encode_record, load_record, save_record

    from .plan import Infeasible
    from .search import solve_placement
    from .summary import summary_lines

    profile = load_record(cluster, ClusterProfile)
    workload = _workload(prompt_tokens, output_tokens, trace, trace_scale)
    with _progress() as on_progress:
        answer = solve_placement(
            profile,
            workload,
            concurrency=concurrency,
            objective=objective,
            method=method,
            time_limit_s=time_limit_s,
            threads=threads,
            seed=seed,
            partial=not no_partial,
            on_progress=on_progress,
        )
    if isinstance(answer, Infeasible):
        if as_json:
            sys.stdout.write(encode_record(answer).decode())
        print(f"helixbench: infeasible: {answer.reason}", file=sys.stderr)
        raise typer.Exit(1)
    save_record(output, answer)
    if as_json:
        sys.stdout.write(encode_record(answer).decode())
    else:
        print("\n".join(summary_lines(answer)))
    print(f"plan written to {output}", file=sys.stderr)


def _workload(prompt: int | None, output: int | None, trace: Path | None, scale: float) -> Workload:
    from profiler.errors import InputError

    from .workload import fixed_workload, trace_workload

    if trace is not None:
        if prompt is not None or output is not None:
            raise InputError("--trace and --prompt-tokens/--output-tokens both say how long requests are; give one")
        if scale <= 0:
            raise InputError(f"--trace-scale {scale}: need more than 0")
        return trace_workload(trace, scale=scale)
    if (prompt is None) != (output is None):
        raise InputError("give --prompt-tokens and --output-tokens together, or neither")
    return fixed_workload(
        prompt_tokens=DEFAULT_PROMPT_TOKENS if prompt is None else prompt,
        output_tokens=DEFAULT_OUTPUT_TOKENS if output is None else output,
    )


@contextmanager
def _progress() -> Iterator[OnProgress]:
    """Progress on stderr: one live line on a terminal, a line for each change elsewhere."""
    from rich.console import Console

    console = Console(stderr=True)
    if console.is_terminal:
        with console.status("solving") as status:
            yield lambda moment: status.update(_line(moment))
        return
    seen: list[str] = []

    def say(moment: Progress) -> None:
        line = _line(moment)
        known = line.split(" s  ", 1)[1]
        if not seen or seen[-1] != known:
            seen.append(known)
            print(line, file=sys.stderr)

    yield say


def _line(moment: Progress) -> str:
    best = "none yet" if moment.incumbent_tokens_per_s is None else f"{moment.incumbent_tokens_per_s:.1f}"
    gap = "" if moment.gap is None else f"  gap {moment.gap:.2%}"
    return (
        f"{moment.seconds:6.1f} s  max-flow {best}  bound {moment.bound_tokens_per_s:.1f} tokens/s{gap}  {moment.doing}"
    )
