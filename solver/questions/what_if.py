"""What-if clusters, with nodes added or removed, and the weights that a new plan has to load."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

import msgspec

from helixbench.errors import InputError
from helixbench.profiler.cluster import ClusterProfile, Link, ModelFacts, Node
from helixbench.solver.problem.capacity import Capacities
from helixbench.solver.problem.plan import LayerRange, Placement


def without_nodes(profile: ClusterProfile, names: Sequence[str]) -> ClusterProfile:
    """The cluster without some nodes and their links.

    Raises:
        InputError: no such node, or none left.
    """
    known = {node.name for node in profile.nodes}
    for name in names:
        if name not in known:
            raise InputError(f"no node {name!r} to leave out; there are {', '.join(sorted(known))}")
    nodes = tuple(node for node in profile.nodes if node.name not in names)
    if not nodes:
        raise InputError("no node is left")
    links = tuple(link for link in profile.links if link.src not in names and link.dst not in names)
    return msgspec.structs.replace(profile, nodes=nodes, links=links)


def with_nodes(profile: ClusterProfile, wanted: Sequence[str]) -> ClusterProfile:
    """The cluster with more nodes like some that it has: ``2xL4``. They get the links of the node they are like.

    With that node and with each other they are linked as it is with the nearest of its device and region or, where it
    has no link to such a one and there is no ``default_link``, by its fastest link to and from a node of its region.
    Where it has none of these they are not linked.

    Raises:
        InputError: not of that form, or no node with that device or name to be like.
    """
    for text in wanted:
        profile = _with_more_nodes(profile, text)
    return profile


def _with_more_nodes(profile: ClusterProfile, wanted: str) -> ClusterProfile:
    found = re.fullmatch(r"(?:(\d+)x)?(.+)", wanted)
    count = int(found.group(1) or 1) if found else 0
    like = found.group(2) if found else ""
    example = next(
        (node for node in profile.nodes if like.lower() in (node.device.name.lower(), node.name.lower())), None
    )
    if count < 1 or example is None:
        devices = sorted({node.device.name for node in profile.nodes})
        raise InputError(f"--add {wanted}: need NUMBERxDEVICE with a device of the cluster: {', '.join(devices)}")
    names = {node.name for node in profile.nodes}
    fresh = [name for i in range(len(names) + count) if (name := f"{example.name}-new{i + 1}") not in names][:count]
    links = list(profile.links)
    for name in fresh:
        links += [msgspec.structs.replace(k, src=name) for k in profile.links if k.src == example.name]
        links += [msgspec.structs.replace(k, dst=name) for k in profile.links if k.dst == example.name]
    links += _links_among(profile, example, fresh)
    nodes = (*profile.nodes, *(msgspec.structs.replace(example, name=name, exclusive_group="") for name in fresh))
    return msgspec.structs.replace(profile, nodes=nodes, links=tuple(links))


def _links_among(profile: ClusterProfile, example: Node, fresh: Sequence[str]) -> Iterator[Link]:
    """Links of the example and the nodes like it with each other, both ways; see ``with_nodes``."""
    outward = _link_beside(profile, example, [(link.dst, link) for link in profile.links if link.src == example.name])
    inward = _link_beside(profile, example, [(link.src, link) for link in profile.links if link.dst == example.name])
    names = (example.name, *fresh)
    for first, second in itertools.combinations(names, 2):
        if outward is not None:
            yield msgspec.structs.replace(outward, src=first, dst=second)
        if inward is not None:
            yield msgspec.structs.replace(inward, src=second, dst=first)


def _link_beside(profile: ClusterProfile, example: Node, links: Sequence[tuple[str, Link]]) -> Link | None:
    """The fastest to a twin, else in the region if there is no default; ``links`` are (other end, link)."""
    beside = {node.name: node for node in profile.nodes if node.region == example.region and node is not example}
    with_twin = [link for end, link in links if end in beside and beside[end].device.name == example.device.name]
    inside = [] if profile.default_link is not None else [link for end, link in links if end in beside]
    return max(with_twin or inside, key=lambda link: (link.bandwidth_bytes_per_s, -link.latency_s), default=None)


def parse_pins(texts: Iterable[str]) -> dict[str, LayerRange]:
    """Pins by node, each given as ``node=[a,b)``; ``node=a-b`` and ``node=a,b`` are the same.

    Raises:
        InputError: one is not of that form, or two are of one node.
    """
    pins: dict[str, LayerRange] = {}
    for text in texts:
        found = re.fullmatch(r"(.+?)=\[?(\d+)\s*[,-]\s*(\d+)\)?", text)
        if found is None:
            raise InputError(f"--pin {text}: need NODE=[START,END), for example n1=[0,8)")
        name = found.group(1)
        if name in pins:
            raise InputError(f"--pin {text}: {name} is pinned to {pins[name]} already; give one pin for each node")
        try:
            pins[name] = LayerRange(int(found.group(2)), int(found.group(3)))
        except ValueError as error:
            raise InputError(f"--pin {text}: {error}") from error
    return pins


def with_fewest_bytes_moved(
    capacities: Capacities, before: Mapping[str, LayerRange], after: Mapping[str, LayerRange]
) -> Placement:
    """``after`` with the ranges of alike nodes given to those that have the least to load for them.

    Nodes are alike when they differ only in name; their links may still differ, so the caller compares the flows.
    """
    import numpy as np
    from scipy.optimize import linear_sum_assignment

    members_of: dict[int, list[str]] = {}
    for name in capacities.nodes:
        members_of.setdefault(capacities.kind(name), []).append(name)
    placement: Placement = {}
    for members in members_of.values():
        ranges = sorted(after[name] for name in members if name in after)
        if not ranges:
            continue
        # A node that keeps its range in part still has to change it: that costs a little more than keeping it whole.
        cost = np.array(
            [
                [
                    bytes_to_load(capacities.model, before.get(name), held) + (before.get(name) != held)
                    for held in ranges
                ]
                for name in members
            ]
        )
        for row, column in zip(*linear_sum_assignment(cost), strict=True):
            placement[members[row]] = ranges[column]
    return placement


def bytes_to_load(model: ModelFacts, before: LayerRange | None, after: LayerRange | None) -> float:
    """Bytes of weights that a node lacks for its new range: layers, embedding with the first, head with the last."""
    if after is None:
        return 0.0
    kept = max(0, min(before.end, after.end) - max(before.start, after.start)) if before else 0
    has_embedding = before is not None and before.start == 0
    has_head = before is not None and before.end == model.num_layers
    size = (after.num_layers - kept) * model.layer_weight_bytes
    size += model.embedding_bytes * (after.start == 0 and not has_embedding)
    return size + model.head_bytes * (after.end == model.num_layers and not has_head)
