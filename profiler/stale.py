"""Is a profile still true of what it is used on? Device, versions and model then, against those now. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from .cluster_profile import Device, Node

# What decides how fast a stage runs. Clocks of the moment, temperatures and memory in use are no part of it.
DEVICE_FACTS = (
    "uuid",
    "compute_capability",
    "driver",
    "power_limit_w",
    "sm_max_frequency_hz",
    "ecc",
    "mig",
    "physical_cores",
    "machine",
    "torch_threads",
    "torch_instruction_set",
    "torch_blas",
)
VERSION_PARTS = {"torch": 2, "transformers": 2, "helixbench": 2, "python": 2, "pyzmq": 1}
"""How many parts of a version have to agree: a patch release does not make a profile stale."""


def identity_of(device: Device, versions: Mapping[str, str]) -> dict[str, str]:
    """What a node's profile holds for, as text by name; facts that nobody stated are left out."""
    identity = {"device": device.kind, "name": device.name}
    identity |= {fact: _text(device.facts[fact]) for fact in DEVICE_FACTS if fact in device.facts}
    for library, parts in VERSION_PARTS.items():
        if library in versions:
            identity[library] = ".".join(versions[library].split("+")[0].split(".")[:parts])
    return identity


def identity_of_node(node: Node) -> dict[str, str]:
    """Of a profiled node; empty where the profile does not say with which libraries it was made: a table's node."""
    return identity_of(node.device, node.versions) if node.versions else {}


def differences(profiled: Mapping[str, str], found: Mapping[str, str]) -> tuple[str, ...]:
    """What is otherwise now: ``torch 2.11 -> 2.12``. What only one of the two states does not count."""
    return tuple(
        f"{name} {profiled[name]} -> {found[name]}"
        for name in profiled
        if name in found and profiled[name] != found[name]
    )


def stale_parts(profiled: Mapping[str, Mapping[str, str]], found: Mapping[str, Mapping[str, str]]) -> tuple[str, ...]:
    """One line for each node (of both mappings) whose profile was made on something else."""
    lines = []
    for node, identity in profiled.items():
        differing = differences(identity, found.get(node, {}))
        if differing:
            lines.append(f"{node}: {', '.join(differing)}")
    return tuple(lines)


def _text(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:g}"
