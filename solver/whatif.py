"""What if: clusters with nodes added or taken away, and what a new plan moves against an old one."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import msgspec

from profiler.cluster_profile import ClusterProfile
from profiler.errors import InputError

from .plan import LayerRange, Plan


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


def with_nodes(profile: ClusterProfile, wanted: str) -> ClusterProfile:
    """The cluster with more nodes like some that it has: ``2xL4``. They get the links of the node they are like.

    Raises:
        InputError: not of that form, or no node with that device or name to be like.
    """
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
    nodes = (*profile.nodes, *(msgspec.structs.replace(example, name=name) for name in fresh))
    return msgspec.structs.replace(profile, nodes=nodes, links=tuple(links))


def parse_pin(text: str) -> tuple[str, LayerRange]:
    """``node=[a,b)`` as (node, range); ``node=a-b`` and ``node=a,b`` say the same.

    Raises:
        InputError: not of that form.
    """
    found = re.fullmatch(r"(.+?)=\[?(\d+)\s*[,-]\s*(\d+)\)?", text)
    if found is None:
        raise InputError(f"--pin {text}: need NODE=[START,END), for example n1=[0,8)")
    try:
        return found.group(1), LayerRange(int(found.group(2)), int(found.group(3)))
    except ValueError as error:
        raise InputError(f"--pin {text}: {error}") from error


def difference_lines(profile: ClusterProfile, before: Plan, after: Plan) -> Iterator[str]:
    """What changes from one plan to another: ranges, bytes to load, tokens/s."""
    size = profile.model.layer_weight_bytes
    for name in sorted({*before.placement, *after.placement}):
        old, new = before.placement.get(name), after.placement.get(name)
        if old == new:
            continue
        kept = max(0, min(old.end, new.end) - max(old.start, new.start)) if old and new else 0
        load = (new.num_layers - kept) * size if new else 0.0
        yield f"  {name}: {old or 'unused'} -> {new or 'unused'}, {load / 1e9:.2f} GB to load"
    for label, was, now in (
        ("max-flow", before.predicted.max_flow_tokens_per_s, after.predicted.max_flow_tokens_per_s),
        (
            "expected",
            before.predicted.expected[-1].total_tokens_per_s,
            after.predicted.expected[-1].total_tokens_per_s,
        ),
    ):
        yield f"  {label}: {was:.1f} -> {now:.1f} tokens/s ({now / was - 1:+.1%})"
