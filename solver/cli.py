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
    cluster = typer.Typer(help="Made-up clusters.", no_args_is_help=True)
    cluster.command("make")(make)
    app.add_typer(cluster, name="cluster")


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
    max_tpot_s: Annotated[float | None, typer.Option(help="most seconds for each output token")] = None,
    max_ttft_s: Annotated[float | None, typer.Option(help="most seconds to the first output token")] = None,
    min_tokens_per_s: Annotated[float | None, typer.Option(help="fewest nodes that are expected to give this")] = None,
    method: Annotated[str, typer.Option(help="auto, petals, swarm, homogeneous or separate")] = "auto",
    compare: Annotated[bool, typer.Option("--compare", help="print all methods side by side")] = False,
    pin: Annotated[list[str] | None, typer.Option(help="NODE=[START,END): what a node has to hold")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="a node not to use")] = None,
    add: Annotated[list[str] | None, typer.Option(help="what if: more nodes, like 2xL4")] = None,
    remove: Annotated[list[str] | None, typer.Option(help="what if: without that node")] = None,
    time_limit_s: Annotated[float, typer.Option(help="return the best plan by then")] = 60.0,
    threads: Annotated[int, typer.Option(help="threads of the solver")] = 1,
    seed: Annotated[int, typer.Option(help="same input and seed, same plan")] = 0,
    no_partial: Annotated[bool, typer.Option("--no-partial", help="requests enter ranges only at their start")] = False,
    output: Annotated[Path, typer.Option("--output", "-o", help="where the plan goes")] = Path("plan.json"),
    as_json: Annotated[bool, typer.Option("--json", help="print the plan as JSON on stdout")] = False,
) -> None:
    """Plan a model onto a cluster: the best placement in the time given, its proven bound and what to expect."""
    from profiler.cluster_profile import ClusterProfile
    from profiler.errors import InputError
    from profiler.records import encode_record, load_record, save_record

    from .capacity import Capacities
    from .compare import comparison_lines
    from .plan import Infeasible, Plan
    from .search import solve_placement
    from .summary import summary_lines
    from .targets import fewest_nodes, most_within_latency
    from .whatif import difference_lines, parse_pin, with_nodes, without_nodes

    before = load_record(cluster, ClusterProfile)
    profile = without_nodes(before, [*(exclude or []), *(remove or [])])
    for wanted in add or []:
        profile = with_nodes(profile, wanted)
    workload = _workload(prompt_tokens, output_tokens, trace, trace_scale)
    pins = dict(parse_pin(text) for text in pin or [])
    limits = (max_tpot_s, max_ttft_s)
    if any(limit is not None and limit <= 0 for limit in (*limits, min_tokens_per_s)):
        raise InputError("--max-tpot-s, --max-ttft-s, --min-tokens-per-s: need more than 0")
    if min_tokens_per_s is not None and any(limit is not None for limit in limits):
        raise InputError("--min-tokens-per-s and a latency limit ask for two different plans; give one")
    has_target = min_tokens_per_s is not None or any(limit is not None for limit in limits)
    if has_target and objective == "max-flow":
        raise InputError("latency and throughput targets are about what is expected; leave out --objective max-flow")

    def answer_for(on: ClusterProfile, requests: int | None, seconds: float) -> Plan | Infeasible:
        with _progress() as on_progress:
            return solve_placement(
                on,
                workload,
                concurrency=requests,
                objective=objective,
                method=method,
                time_limit_s=seconds,
                threads=threads,
                seed=seed,
                partial=not no_partial,
                pins={name: held for name, held in pins.items() if any(node.name == name for node in on.nodes)},
                on_progress=on_progress,
            )

    for name in pins:
        if all(node.name != name for node in profile.nodes):
            raise InputError(f"--pin {name}: no such node in the cluster that is planned for")
    if min_tokens_per_s is not None:
        answer = fewest_nodes(
            answer_for,
            profile,
            Capacities(profile, workload, concurrency=concurrency),
            concurrency=concurrency,
            wanted=min_tokens_per_s,
            seconds=time_limit_s,
        )
    elif has_target:
        answer = most_within_latency(
            answer_for,
            profile,
            concurrency=concurrency,
            max_tpot_s=max_tpot_s,
            max_ttft_s=max_ttft_s,
            seconds=time_limit_s,
        )
    else:
        answer = answer_for(profile, concurrency, time_limit_s)
    if isinstance(answer, Infeasible):
        if as_json:
            sys.stdout.write(encode_record(answer).decode())
        print(f"helixbench: infeasible: {answer.reason}", file=sys.stderr)
        raise typer.Exit(1)
    save_record(output, answer)
    lines = [] if as_json else [*summary_lines(answer)]
    if compare:
        lines += comparison_lines(profile, answer)
    if add or remove:
        unchanged = answer_for(before, concurrency, time_limit_s)
        if isinstance(unchanged, Plan):
            lines += ["against the cluster as it is:", *difference_lines(profile, unchanged, answer)]
        else:
            lines.append(f"the cluster as it is has no plan: {unchanged.reason}")
    if as_json:
        sys.stdout.write(encode_record(answer).decode())
    print("\n".join(lines), file=sys.stderr if as_json else sys.stdout)
    print(f"plan written to {output}", file=sys.stderr)


def make(
    output: Annotated[Path, typer.Option("--output", "-o", help="where the cluster goes")],
    nodes: Annotated[int, typer.Option(help="how many nodes")] = 24,
    types: Annotated[int, typer.Option(help="how many types of device, up to 8")] = 3,
    regions: Annotated[int, typer.Option(help="how many regions, with slow links between them")] = 1,
    seed: Annotated[int, typer.Option(help="same numbers and seed, same cluster")] = 0,
) -> None:
    """Make a cluster from a seed, to try the solver on. Its figures are not measured."""
    from profiler.records import save_record

    from .generate import make_cluster

    save_record(output, make_cluster(num_nodes=nodes, num_types=types, num_regions=regions, seed=seed))
    print(f"cluster written to {output}", file=sys.stderr)


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
