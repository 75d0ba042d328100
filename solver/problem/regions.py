"""Regions of a cluster, inferred from its links: groups of nodes with fast links inside and slow ones between them.

The distance of two nodes is the logarithm of the seconds that a batch takes over their link, both ways averaged. Groups
are merged by average linkage (Sokal and Michener, 1958): a mean of logarithms is a geometric mean, so links that vary,
that differ by direction, or a single odd one move it little. The tree of merges is cut where the distance rises most
from one merge to the next, if it rises by ``FAR`` there; else the cluster is one region.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from helixbench.profiler.cluster import ClusterProfile
from helixbench.solver.problem.arrays import FloatArray, IntArray

BATCH_TOKENS = 64
"""Tokens of the message whose time is the distance: latency counts as much as some bandwidth does."""

LOCAL_S = 1e-3
"""Seconds below which links are alike: a link in a machine and one in a rack are both as good as none."""

FAR = 3.0
"""Factor in seconds from the links inside regions to those between them."""

UNCONNECTED = 10.0
"""Seconds between nodes that are not connected, as a multiple of the slowest link."""


def inferred_regions(profile: ClusterProfile) -> dict[str, str]:
    """Node -> its region by the links alone.

    A region is called what most of its nodes are labelled, with a number where another one is called so already.
    Without labels regions are ``group-1``, ``group-2``, ..., and a single one is ``""``.
    """
    names = [node.name for node in profile.nodes]
    groups = _groups(_seconds_apart(profile, names))
    members: dict[int, list[str]] = defaultdict(list)
    for name, group in zip(names, groups, strict=True):
        members[group].append(name)
    labels = {node.name: node.region for node in profile.nodes}
    called = _called([[labels[name] for name in of] for of in members.values()])
    return {name: region for of, region in zip(members.values(), called, strict=True) for name in of}


def region_notes(profile: ClusterProfile, regions: Mapping[str, str]) -> tuple[str, ...]:
    """A note on the nodes whose label is not the region that their links put them in."""
    odd: dict[tuple[str, str], list[str]] = defaultdict(list)
    for node in profile.nodes:
        if node.region and node.region != regions[node.name]:
            odd[node.region, regions[node.name]].append(node.name)
    listed = [f"{', '.join(names)} (labelled {label}) in {region}" for (label, region), names in sorted(odd.items())]
    return (f"regions follow the links, which contradict the labels: {'; '.join(listed)}",) if listed else ()


def _seconds_apart(profile: ClusterProfile, names: Sequence[str]) -> FloatArray:
    """``[src, dst]``: seconds of a batch over the link; infinite where there is none."""
    size = BATCH_TOKENS * profile.model.activation_bytes_per_token
    number = {name: index for index, name in enumerate(names)}
    default = profile.default_link
    between = math.inf if default is None else default.latency_s + size / default.bandwidth_bytes_per_s
    seconds: FloatArray = np.full((len(names), len(names)), between)
    for link in profile.links:
        if link.src in number and link.dst in number:
            seconds[number[link.src], number[link.dst]] = link.latency_s + size / link.bandwidth_bytes_per_s
    return seconds


def _groups(seconds: FloatArray) -> list[int]:
    """The group of each node, numbered in the order in which they first occur."""
    from scipy.cluster.hierarchy import fcluster, linkage
    from scipy.spatial.distance import squareform

    size = len(seconds)
    known = np.isfinite(seconds) & ~np.eye(size, dtype=bool)
    if size < 3 or not known.any():
        return [0] * size
    slowest = max(LOCAL_S, float(seconds[known].max()))
    apart = np.log(np.maximum(LOCAL_S, np.where(known, seconds, UNCONNECTED * slowest)) / LOCAL_S)
    apart = (apart + apart.T) / 2
    np.fill_diagonal(apart, 0.0)
    tree = linkage(squareform(apart), method="average")
    heights = tree[:, 2]
    rises = np.diff(heights)
    widest = int(rises.argmax())
    if rises[widest] < math.log(FAR):
        return [0] * size
    cut = (heights[widest] + heights[widest + 1]) / 2
    found = _with_most_beside(apart, fcluster(tree, cut, criterion="distance").astype(np.int64), cut)
    order: dict[int, int] = {}
    return [order.setdefault(group, len(order)) for group in found]


def _with_most_beside(apart: FloatArray, groups: IntArray, cut: float) -> list[int]:
    """Each node in the largest group to whose nodes its median distance is below the cut.

    Two nodes of two regions with an odd fast link are merged first of all, and are then half as far as the one region
    from the other: they end as a group of their own, or one of them in the other's region.
    """
    placed = groups.copy()
    for node in range(len(placed)):
        others = np.arange(len(placed)) != node
        beside = {
            int(group): int(members.sum())
            for group in np.unique(placed[others])
            if np.median(apart[node, members := others & (placed == group)]) < cut
        }
        if beside:
            placed[node] = max(beside, key=lambda group: (beside[group], -group))
    return [int(group) for group in placed]


def _called(labels: Sequence[Sequence[str]]) -> list[str]:
    """A name for each group of nodes with those labels, all different; the group with most of a label has it first."""
    counts = [Counter(label for label in of if label) for of in labels]
    called = [""] * len(labels)
    taken: set[str] = set()

    def most(number: int) -> int:
        return max(counts[number].values(), default=0)

    for number in sorted(range(len(labels)), key=lambda number: (-most(number), number)):
        if len(labels) == 1 and not counts[number]:
            break
        common = min(counts[number], key=lambda label: (-counts[number][label], label), default=f"group-{number + 1}")
        candidates = (common, *(f"{common}-{again}" for again in range(2, len(labels) + 2)))
        called[number] = next(name for name in candidates if name not in taken)
        taken.add(called[number])
    return called
