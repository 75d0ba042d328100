"""Why a cluster cannot hold the model, in words."""

from __future__ import annotations

from helixbench.profiler.cluster import COORDINATOR, ClusterProfile
from helixbench.solver.problem.capacity import Capacities
from helixbench.solver.problem.plan import LayerRange, joined


def why_infeasible(capacities: Capacities) -> str | None:
    """The reason why no placement exists, as far as it can be told without a search; ``None`` where none is found."""
    needed = capacities.model.num_layers
    most = {name: capacities.max_layers(name) for name in capacities.nodes}
    # The first and the last range also hold embedding and head; a node that fits none of them still helps inside.
    if sum(most.values()) < needed:
        listed = ", ".join(f"{name} {layers}" for name, layers in most.items())
        reason = f"the model needs {needed} layers; all nodes together hold {sum(most.values())}: {listed}"
        return reason + _kv_note(capacities, most) + _pins_note(capacities)
    if sum(most.values()) < needed * (1 + capacities.survive):
        return (
            f"to survive the loss of any one node {needed} layers have to be held twice; "
            f"all nodes together hold {sum(most.values())}"
        )
    uncovered = [layer for layer in range(needed) if not any(_can_hold_layer(capacities, name, layer) for name in most)]
    if uncovered:
        return _why_uncovered(capacities, uncovered)
    if not _connected(capacities.profile, [name for name, layers in most.items() if layers]):
        return "no links lead from the coordinator over the nodes and back to it"
    return None


def _can_hold_layer(capacities: Capacities, name: str, layer: int) -> bool:
    """Whether some range that the node can hold has that layer: the shortest needs least."""
    held = capacities.pins.get(name, LayerRange(layer, layer + 1))
    return held.start <= layer < held.end and capacities.can_hold(name, held)


def _why_uncovered(capacities: Capacities, layers: list[int]) -> str:
    model = capacities.model
    which = ", ".join(map(str, joined(LayerRange(layer, layer + 1) for layer in layers)))
    reason = f"no node can hold layers {which} of {model.num_layers}"
    beside = [
        f"the {what} of {size:.4g} bytes"
        for what, size, is_there in (
            ("embedding", model.embedding_bytes, layers[0] == 0),
            ("head", model.head_bytes, layers[-1] == model.num_layers - 1),
        )
        if is_there and size and len(capacities.pins) < len(capacities.nodes)
    ]
    beside += [f"the KV cache of the longest request, {capacities.mix.max_kv_tokens} tokens"] if beside else []
    if beside:
        reason += f" together with {' and '.join(beside)}"
    return reason + _pins_note(capacities)


def _pins_note(capacities: Capacities) -> str:
    if not capacities.pins:
        return ""
    listed = ", ".join(f"{name}={held}" for name, held in capacities.pins.items())
    return f" (pinned: {listed}; a pinned node holds that range or nothing)"


def _kv_note(capacities: Capacities, most: dict[str, int]) -> str:
    wanted = {
        name: capacities.pins[name].num_layers if name in capacities.pins else capacities.nodes[name].max_layers
        for name in most
    }
    short = [name for name, layers in most.items() if layers < wanted[name]]
    if not short:
        return ""
    return (
        f" (beside its weights each node must hold the KV cache of the longest request, "
        f"{capacities.mix.max_kv_tokens} tokens; that is what limits {', '.join(short)})"
    )


def _connected(profile: ClusterProfile, names: list[str]) -> bool:
    """Whether links lead from the coordinator over some of the nodes and back to it, whatever they hold."""
    if profile.default_link is not None:
        return True
    onward: dict[str, set[str]] = {}
    for link in profile.links:
        onward.setdefault(link.src, set()).add(link.dst)
    usable, reached, waiting = set(names), set[str](), [COORDINATOR]
    while waiting:
        for name in onward.get(waiting.pop(), set()) - reached:
            reached.add(name)
            if name in usable:
                waiting.append(name)
    return COORDINATOR in reached
