"""Is a profile still true of what it is used on? Device, versions and model then, against those now. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from helixbench.profiler.cluster import Device, Node

# What decides how fast a stage runs. Clocks of the moment, temperatures and memory in use are no part of it.
DEVICE_FACTS = (
    "device_digest",
    "uuid",
    "compute_capability",
    "torch_cuda",
    "driver",
    "power_limit_w",
    "sm_max_frequency_hz",
    "ecc",
    "mig",
    "physical_cores",
    "machine",
    "threads",
    "instruction_set",
)
ASKED_OF_A_GPU = ("driver", "power_limit_w", "ecc")
"""What NVML says of every GPU that has it: stated on one side alone, nobody can tell whether it is still so."""
ONCE_STATED = ("torch_cuda",)
"""What a profile states since it knows of it; one that was made before states nothing, which is no difference."""

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
    """What is otherwise now: ``torch 2.11 -> 2.12``.

    What only one of the two states does not count, but for what decides the speed: ``driver not known now (570 when
    profiled)``. Nothing is compared with a table's node, which states nothing.
    """
    if not profiled:
        return ()
    return tuple(line for name in {**profiled, **found} if (line := _difference(name, profiled, found)))


def _difference(name: str, profiled: Mapping[str, str], found: Mapping[str, str]) -> str:
    """Empty where there is none that counts."""
    then, now = profiled.get(name), found.get(name)
    if then is not None and now is not None:
        return "" if then == now else f"{name} {then} -> {now}"
    if profiled.get("device") != found.get("device"):
        return ""  # another kind of device, of which other things are known
    if then is not None and name in (*ONCE_STATED, *ASKED_OF_A_GPU):
        return f"{name} not known now ({then} when profiled)"
    if now is not None and name in ASKED_OF_A_GPU:
        return f"{name} not known when profiled ({now} now)"
    return ""


def stale_parts(profiled: Mapping[str, Mapping[str, str]], found: Mapping[str, Mapping[str, str]]) -> tuple[str, ...]:
    """One line for each node (of both mappings) whose profile was made on something else."""
    lines = []
    for node, identity in profiled.items():
        differing = differences(identity, found[node]) if node in found else ()
        if differing:
            lines.append(f"{node}: {', '.join(differing)}")
    return tuple(lines)


def _text(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:g}"
