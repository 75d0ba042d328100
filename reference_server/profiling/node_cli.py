"""``helixbench profile node``: parses, measures this machine's own device, prints."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import msgspec
import typer

from helixbench.errors import InputError

if TYPE_CHECKING:
    from rich.table import Table

    from helixbench.profiler.cluster import ClusterProfile, Node

INTERRUPTED = 130
SHOWN_BATCHES = (1, 8, 32, 128)


def profile_node_command(
    model: Annotated[str, typer.Option("--model", help="Hugging Face model directory or hub id.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The profile to write.")] = Path("node.json"),
    name: Annotated[str, typer.Option(help="The node's name in the profile.")] = "node",
    device: Annotated[str, typer.Option(help="cpu or cuda:N.")] = "cpu",
    memory: Annotated[str, typer.Option(help="For weights, workspace and KV cache, e.g. 20GB. Default: all.")] = "",
    threads: Annotated[
        Optional[int],  # noqa: UP045 - typer reads it
        typer.Option(min=1, help="Threads that compute on a CPU. Default: one for each core."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    max_batch_tokens: Annotated[int, typer.Option(min=8, help="Tokens of one iteration at most.")] = 128,
    max_context_tokens: Annotated[int, typer.Option(min=32, help="Longest context to measure.")] = 512,
    budget_s: Annotated[
        float, typer.Option("--budget-s", min=0, help="Seconds to sample; three rounds at least.")
    ] = 100.0,
    plan_only: Annotated[bool, typer.Option("--plan-only", help="Say what would be measured, and how long.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted run of the same command.")
    ] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print the record on stdout.")] = False,
) -> None:
    """Measure this machine's device alone. Ctrl-C keeps what was measured; --resume goes on with it."""
    from rich.console import Console

    from helixbench.profiler.model.dtypes import resolve_dtype
    from helixbench.profiler.model.files import ModelFiles
    from helixbench.records import command_line, encode_record, require_writable, save_record
    from helixbench.reference_server.profiling.local import NodeProfileConfig, plan_node, profile_node
    from helixbench.units import parse_bytes

    files = ModelFiles(model)
    try:
        memory_bytes = None if not memory else float(memory) if memory.isdigit() else parse_bytes(memory)
    except ValueError as error:
        raise InputError(f"--memory {memory}: {error}") from error
    config = NodeProfileConfig(
        model=str(files.directory),
        dtype=resolve_dtype(dtype, files.saved_dtype),
        name=name,
        device=device,
        memory_bytes=memory_bytes,
        threads=threads,
        max_batch_tokens=max_batch_tokens,
        max_context_tokens=max_context_tokens,
        budget_s=budget_s,
        command=command_line(),
    )
    if plan_only:
        times = plan_node(config)
        if json_:
            sys.stdout.write(msgspec.json.encode(times).decode() + "\n")
            return
        print(
            f"{times.num_points} points ({times.num_held_out} kept out of the fit), {times.num_layers} layers held, "
            f"{times.num_rounds} rounds in about {times.least_s:.0f} s after {times.prepare_s:.0f} s to prepare; then "
            f"noisy points again until {times.budget_s:.0f} s are used"
        )
        return
    partial = output.with_name(output.name + ".partial")
    require_writable(output)
    with _Progress() as progress:
        try:
            made = profile_node(config, partial=partial, resume=resume, on_block=progress.update)
        except KeyboardInterrupt:
            kept = f"what was measured is in {partial}; go on with --resume" if partial.exists() else "nothing was kept"
            print(f"helixbench: interrupted; {kept}", file=sys.stderr)
            raise typer.Exit(INTERRUPTED) from None
    save_record(output, made)
    if json_:
        sys.stdout.write(encode_record(made).decode())
    else:
        Console().print(node_table(made))
        print("\n".join(quality_lines(made.nodes[0])))
    print(f"{output} written; see it with: helixbench report {output}", file=sys.stderr)


def node_table(profile: ClusterProfile) -> Table:
    """Milliseconds of a layer, the embedding and the head over decoding batches."""
    from rich.table import Table

    from helixbench.profiler.cost.model import BatchShape

    node = profile.nodes[0]
    assert node.cost is not None
    stage = node.cost.stage
    table = Table(title=f"{node.name}: {node.device.name}, model {profile.model.name} {profile.model.dtype}")
    for heading in ("decoding", "layer ms", "rest of an iteration ms", "embedding ms", "head ms"):
        table.add_column(heading, justify="right")
    for size in SHOWN_BATCHES:
        if size > node.cost.max_batch_tokens:
            continue
        batch = BatchShape(decode_tokens=size, decode_context_tokens=size * 64, sampled_tokens=size)
        step_s = stage.step_s + stage.step_item_s * batch.items + stage.step_token_s * batch.tokens
        ends = (stage.embed_s + stage.embed_token_s * size, stage.head_s + stage.head_item_s * size)
        table.add_row(str(size), *(f"{1e3 * s:.3f}" for s in (stage.layer_time_s(batch), step_s, *ends)))
    return table


def quality_lines(node: Node) -> list[str]:
    """What says how far the profile can be trusted."""
    assert node.cost is not None
    cost = node.cost
    spreads = sorted(sample.spread for sample in cost.samples)
    lines = [
        f"fit: held-out error {cost.held_out_error_median:.1%} median, {cost.held_out_error_p90:.1%} p90; "
        f"{len(cost.samples)} points, spread {spreads[len(spreads) // 2]:.1%} median",
        f"memory: {node.device.memory_bytes / 1e6:.0f} MB, {cost.workspace_bytes / 1e6:.1f} MB beside weights and KV "
        f"cache; {node.max_layers} layers fit",
    ]
    quality = cost.quality
    if quality is None:
        return lines
    if quality.drift:
        lines.append(f"drift: the last round took {quality.drift[-1]:.3f} of the first; {quality.seconds:.0f} s in all")
    lines.append(
        f"discarded: {', '.join(f'{count} for {cause}' for cause, count in quality.discarded.items()) or 'none'}; "
        f"{quality.num_refined} points added where the fit was worst"
    )
    if quality.memory is not None:
        use = quality.memory
        lines.append(
            f"{use.num_layers} layers held: weights {use.weight_bytes / 1e6:.1f} MB, overhead "
            f"{use.overhead_bytes / 1e6:.1f} MB, workspace {use.workspace_bytes / 1e6:.1f} MB, KV cache "
            f"{use.kv_bytes_per_token_per_layer:.0f} bytes a token and layer"
        )
    return lines


class _Progress:
    """A bar that is drawn between blocks and never while one is timed, for a thread that draws would be timed too."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import Progress

        console = Console(file=sys.stderr)
        self._bar = Progress(console=console, auto_refresh=False, disable=not console.is_terminal)
        self._console = console
        self._task = self._bar.add_task("blocks", total=None)
        self._last_tenth = 0

    def __enter__(self) -> _Progress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def update(self, done: int, expected: int) -> None:
        """``done`` blocks of those expected by now."""
        if not self._bar.disable:
            self._bar.update(self._task, completed=done, total=expected, refresh=True)
        elif (tenth := 10 * done // expected) != self._last_tenth:
            self._last_tenth = tenth
            self._console.print(f"  {done} of {expected} blocks", highlight=False)
