"""Whether links can bind, and how large a program they make."""

from __future__ import annotations

from helixbench.profiler.cluster import COORDINATOR
from helixbench.solver.placement import milp
from helixbench.solver.problem.capacity import Capacities
from helixbench.solver.problem.links import LinkTable


def links_bind(capacities: Capacities, bound: float) -> bool:
    """Whether a link or a network card could limit a flow of at most ``bound`` tokens/s."""
    profile = capacities.profile
    table = LinkTable(profile)
    names = [COORDINATOR, *capacities.nodes]
    if profile.default_link is None:
        return True
    ends = {(link.src, link.dst) for link in profile.links}
    slowest = [(COORDINATOR, names[-1]), *ends]
    if any((names[1], other) not in ends for other in names[2:]) and len(names) > 2:
        slowest.append((names[1], names[2]))
    for src, dst in slowest:
        bandwidth = table.bandwidth(src, dst)
        if bandwidth is None or bandwidth / profile.bytes_per_token(src, dst) < bound:
            return True
    if profile.default_link.bandwidth_bytes_per_s / profile.model.activation_bytes_per_token < bound:
        return True
    cards = [(node.nic_out_bytes_per_s, node.nic_in_bytes_per_s) for node in profile.nodes]
    most = max(profile.model.activation_bytes_per_token, profile.model.token_bytes)
    if any(card is not None and card / most < bound for pair in cards for card in pair):
        return True
    coordinator = profile.coordinator
    return any(
        card is not None and card / profile.model.token_bytes < bound
        for card in (coordinator.nic_out_bytes_per_s, coordinator.nic_in_bytes_per_s)
    )


def linked_size(capacities: Capacities, *, partial: bool) -> int:
    """Variables of the node-by-node program."""
    size = 0
    for name in capacities.nodes:
        for held in milp.ranges_of(capacities, name):
            size += 1 + (held.num_layers if partial else 1)
    return size + len(capacities.nodes) ** 2 * capacities.model.num_layers
