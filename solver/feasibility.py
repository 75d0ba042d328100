"""Why a cluster cannot hold the model, in words."""

from __future__ import annotations

from profiler.cluster_profile import COORDINATOR, ClusterProfile

from .capacity import Capacities


def why_infeasible(capacities: Capacities) -> str | None:
    """The reason why no placement exists, as far as it can be told without a search; ``None`` where none is found."""
    needed = capacities.model.num_layers
    most = {name: capacities.max_layers(name) for name in capacities.nodes}
    # The first and the last range also hold embedding and head; a node that fits none of them still helps inside.
    if sum(most.values()) < needed:
        listed = ", ".join(f"{name} {layers}" for name, layers in most.items())
        return f"the model needs {needed} layers; all nodes together hold {sum(most.values())}: {listed}" + _kv_note(
            capacities, most
        )
    if not _connected(capacities.profile, [name for name, layers in most.items() if layers]):
        return "no links lead from the coordinator over the nodes and back to it"
    return None


def _kv_note(capacities: Capacities, most: dict[str, int]) -> str:
    short = [name for name, layers in most.items() if layers < min(capacities.nodes[name].max_layers, 10**9)]
    if not short:
        return ""
    return (
        f" (beside its weights each node must hold the KV cache of the longest request, "
        f"{capacities.mix.max_kv_tokens} tokens; that is what limits {', '.join(short)})"
    )


def _connected(profile: ClusterProfile, names: list[str]) -> bool:
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
