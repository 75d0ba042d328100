"""The published formulation of the placement problem, for comparison: start and length integers, big-M links.

Source: Helix, ASPLOS 2025, section 4.4. Every node has an integer start and one binary for each number of layers;
every link has a binary that is one only where the ranges at its ends join up, and carries flow only then. Under
partial inference two further binaries for each link stand for the two halves of that condition. As published, links are
limited one by one and NICs are not; a node's throughput depends on how many layers it holds, not on which.

A link is taken to carry no more than either of its ends can, which the published form leaves out: otherwise a binary
within HiGHS's tolerance of zero lets hundreds of tokens/s through a link that is not there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from helixbench.profiler.cluster import COORDINATOR
from helixbench.solver.placement.milp import Model
from helixbench.solver.problem.capacity import Capacities
from helixbench.solver.problem.plan import LayerRange

PUBLISHED = "published"
"""Its name as a method."""


def published_model(capacities: Capacities) -> Model:
    """The program over every node that can hold a layer.

    Its bound holds for the whole problem where every node has a capacity table: NICs only lower the flow.
    """
    import pulp

    lengths = {name: found for name in capacities.nodes if (found := _lengths(capacities, name))}
    num_layers = capacities.model.num_layers
    model = Model(pulp.LpProblem(PUBLISHED, pulp.LpMaximize))
    starts, holds, ends = {}, {}, {}
    for number, (name, rates) in enumerate(lengths.items()):
        pin = capacities.pins.get(name)
        lowest, highest = (0, num_layers - 1) if pin is None else (pin.start, pin.start)
        starts[name] = model.problem.add_variable(f"s_{number}", lowest, highest, pulp.LpInteger)
        holds[name] = {k: model.problem.add_variable(f"b_{number}_{k}", 0, 1, pulp.LpInteger) for k in rates}
        model.problem += pulp.lpSum(holds[name].values()) == 1
        ends[name] = starts[name] + pulp.lpSum(k * hold for k, hold in holds[name].items())
        model.problem += ends[name] <= num_layers
    flows = _link_flows(model.problem, capacities, lengths, starts, ends)
    for name, rates in lengths.items():
        entering = pulp.lpSum(flow for (_, dst), flow in flows.items() if dst == name)
        leaving = pulp.lpSum(flow for (src, _), flow in flows.items() if src == name)
        model.problem += entering == leaving
        model.problem += entering <= pulp.lpSum(rates[k] * hold for k, hold in holds[name].items())
    model.problem.setObjective(pulp.lpSum(flow for (src, _), flow in flows.items() if src == COORDINATOR))

    def decode(values: Sequence[float]) -> dict[str, LayerRange]:
        placement = {}
        for name, start in starts.items():
            first = round(values[start.index])
            length = max(holds[name], key=lambda k: values[holds[name][k].index])
            placement[name] = LayerRange(first, first + length)
        return placement

    model.decode = decode
    return model


def _lengths(capacities: Capacities, name: str) -> dict[int, float]:
    """Numbers of layers that the node can hold -> its tokens/s, away from embedding and head where it can be."""
    num_layers = capacities.model.num_layers
    pin = capacities.pins.get(name)
    found = {}
    for k in range(1, min(capacities.nodes[name].max_layers, num_layers) + 1):
        held = capacities.middle(k) if pin is None else pin
        if held.num_layers == k and capacities.can_hold(name, held):
            found[k] = capacities.tokens_per_s(name, held)
    return found


def _link_flows(
    problem: Any,
    capacities: Capacities,
    lengths: Mapping[str, Mapping[int, float]],
    starts: Mapping[str, Any],
    ends: Mapping[str, Any],
) -> dict[tuple[str, str], Any]:
    """(src, dst) -> flow, with the binaries that let it be more than 0 only where the ranges join up."""
    import pulp

    num_layers = capacities.model.num_layers
    most = {name: max(rates.values()) for name, rates in lengths.items()}
    flows = {}
    for a, src in enumerate((COORDINATOR, *lengths)):
        for b, dst in enumerate((COORDINATOR, *lengths)):
            bandwidth = None if src == dst else capacities.links.bandwidth(src, dst)
            if bandwidth is None:
                continue
            carries = bandwidth / capacities.profile.bytes_per_token(src, dst)
            carries = min([carries, *(most[end] for end in (src, dst) if end != COORDINATOR)])
            flow = problem.add_variable(f"f_{a}_{b}", 0)
            joins = problem.add_variable(f"d_{a}_{b}", 0, 1, pulp.LpInteger)
            problem += flow <= carries * joins
            flows[src, dst] = flow
            if src == COORDINATOR:
                problem += starts[dst] <= num_layers * (1 - joins)
            elif dst == COORDINATOR:
                problem += num_layers * joins <= ends[src]
            elif capacities.partial:
                begun, goes_on = (
                    problem.add_variable(f"{half}_{a}_{b}", 0, 1, pulp.LpInteger) for half in ("begun", "goes_on")
                )
                problem += starts[dst] - ends[src] <= num_layers * (1 - begun)
                problem += ends[src] + 1 - ends[dst] <= (num_layers + 1) * (1 - goes_on)
                problem += 2 * joins <= begun + goes_on
            else:
                problem += starts[dst] - ends[src] <= num_layers * (1 - joins)
                problem += ends[src] - starts[dst] <= num_layers * (1 - joins)
    return flows
