"""The profile of one device as a table of iteration times, and lines on how far it can be trusted."""

from __future__ import annotations

from typing import TYPE_CHECKING

from helixbench.profiler.cost.model import BatchShape, Scope

if TYPE_CHECKING:
    from rich.table import Table

    from helixbench.profiler.cluster import ClusterProfile, Node

SHOWN_BATCHES = (1, 8, 32, 128)
SHOWN_CONTEXT = 64
SHOWN_SCOPES: dict[Scope, str] = {
    "layer": "layer ms",
    "step": "rest of an iteration ms",
    "embedding": "embedding ms",
    "head": "head ms",
}


def node_table(profile: ClusterProfile) -> Table:
    """Milliseconds of a layer, the embedding and the head over decoding batches."""
    from rich.table import Table

    node = profile.nodes[0]
    assert node.cost is not None
    stage = node.cost.stage
    table = Table(title=f"{node.name}: {node.device.label}, model {profile.model.name} {profile.model.dtype}")
    for heading in ("decoding", *SHOWN_SCOPES.values()):
        table.add_column(heading, justify="right")
    for size in SHOWN_BATCHES:
        if size > node.cost.max_batch_tokens:
            continue
        batch = BatchShape(decode_tokens=size, decode_context_tokens=size * SHOWN_CONTEXT, sampled_tokens=size)
        times = (stage.scope_s(scope, batch) for scope in SHOWN_SCOPES)
        table.add_row(str(size), *(f"{1e3 * seconds:.3f}" for seconds in times))
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
