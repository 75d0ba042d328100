"""The min cut in words: which nodes, links and NICs are full, where, and what more of them would give."""

from __future__ import annotations

from collections.abc import Mapping

from helixbench.solver.flow.marginal import MAX_WORK, STEP, flow_with, full_resources, num_left_out, work_of
from helixbench.solver.flow.max_flow import Flow
from helixbench.solver.flow.network import Network, Resource
from helixbench.solver.problem.capacity import Capacities
from helixbench.solver.problem.plan import LayerRange, joined

MAX_LINES = 4
MAX_NAMES = 6


def describe(capacities: Capacities, network: Network, flow: Flow) -> tuple[str, ...]:
    """One line for each type of device and each link or NIC in the min cut, the one that accounts for most first.

    A type's line names all of its nodes that are full: in a row of equal bottlenecks the cut is at any one of them.
    """
    shares = {(share.kind, share.name): share.tokens_per_s for share in flow.cut}
    groups: dict[Resource, list[Resource]] = {}  # kind, type of device or name -> its full resources
    for kind, name in full_resources(network, flow):
        label = capacities.nodes[name].device.label if kind == "node" else name
        groups.setdefault((kind, label), []).append((kind, name))
    cut = {label: sum(shares.get(resource, 0.0) for resource in members) for label, members in groups.items()}
    largest = sorted((label for label in groups if cut[label] > 0), key=lambda label: -cut[label])[:MAX_LINES]
    is_fast = work_of(network) * len(largest) <= MAX_WORK
    lines = []
    for kind, label in largest:
        members = groups[kind, label]
        part = cut[kind, label] / flow.tokens_per_s
        line = _where(kind, label, [name for _, name in members], network.placement)
        line += "" if part > 1 - STEP else f", {part:.0%} of the max-flow passes there"
        if is_fast:
            gain = flow_with(network, members, 1 + STEP) / flow.tokens_per_s - 1
            line += f", 1% more there adds {gain:.2%}"
        lines.append(line)
    left_out = num_left_out(network, flow)
    if left_out:
        lines.append(
            f"marginal values of {left_out} full nodes, links and NICs are left out: each takes two max-flows over "
            f"{network.graph.number_of_edges()} edges"
        )
    return tuple(lines)


def _where(kind: str, label: str, names: list[str], placement: Mapping[str, LayerRange]) -> str:
    if kind == "node":
        names = sorted(names, key=lambda name: (placement[name], name))
        layers = " and ".join(map(str, joined(placement[name] for name in names)))
        holds = f"{label} holds" if len(names) == 1 else f"{label}s hold"
        return f"{holds} layers {layers} at 100% ({_listed(names)})"
    if kind == "link":
        return f"link {label} is full"
    return f"NIC of {label} is full, {'sending' if kind == 'nic out' else 'receiving'}"


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:MAX_NAMES])
    return shown if len(names) <= MAX_NAMES else f"{shown} and {len(names) - MAX_NAMES} more"
