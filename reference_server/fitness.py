"""Whether a node is fit to be profiled and to serve: its own description in, findings with remedies out. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import metadata
from typing import Literal

import msgspec

from helixbench.profiler.cluster import Device
from helixbench.profiler.device import NOT_READ, Facts
from helixbench.units import GB

MIN_FREE_DISK_BYTES, LOW_FREE_DISK_BYTES = 1 * GB, 10 * GB
MIN_MEMORY_BYTES = 1 * GB
MIN_OPEN_FILES = 1024
BUSY_LOAD = 0.5  # of the cores: timings then share them with something else
USED_GPU_MEMORY = 0.1  # of all of it: beyond that something else runs there
LIBRARIES = ("torch", "transformers", "pyzmq")
State = Literal["ok", "warning", "problem"]
# NVML's clock event reasons that make a device slower than it was profiled: reason -> (state, words)
THROTTLING: dict[str, tuple[State, str]] = {
    "SwPowerCap": ("warning", "power cap"),
    "HwSlowdown": ("problem", "hardware slowdown"),
    "SwThermalSlowdown": ("warning", "temperature (software)"),
    "HwThermalSlowdown": ("problem", "temperature (hardware)"),
    "HwPowerBrakeSlowdown": ("problem", "power brake"),
}
# From iperf3's release notes and issue tracker: (first version with it, first version without it, state, defect)
IPERF3_DEFECTS: tuple[tuple[str, str, State, str], ...] = (
    ("0", "3.2", "problem", "has no --connect-timeout"),
    ("3.2", "3.5", "problem", "counts data that arrived after a test's end: rates too high"),
    ("3.5", "3.10", "warning", "some reverse tests do not end"),
    ("3.16", "3.18", "warning", "may crash in its threads"),
)


class Finding(msgspec.Struct, frozen=True, omit_defaults=True):
    """Result of one check. ``remedy`` is one line, empty where nothing is to be done.

    A warning works, but numbers may be worse than they could be; a problem does not work, or numbers would mislead.
    """

    check: str
    state: State
    says: str
    remedy: str = ""


def _finding(check: str, says: str, remedy: str, *, problem: bool = False, warning: bool = False) -> Finding:
    """Ok, without its remedy, where it is neither."""
    if problem or warning:
        return Finding(check, "problem" if problem else "warning", says, remedy)
    return Finding(check, "ok", says)


class NodeFacts(msgspec.Struct, frozen=True):
    """One node's own description; ``machine`` as ``machine_facts`` returns it."""

    devices: tuple[Device, ...]
    versions: dict[str, str]
    machine: Facts


def examine(facts: NodeFacts) -> tuple[Finding, ...]:
    """All findings of one node."""
    return (
        *_versions(facts.versions),
        *(finding for device in facts.devices if device.kind == "cuda" for finding in _gpu(device)),
        _iperf3(str(facts.machine.get("iperf3", ""))),
        *_cpu(facts.machine),
        *_machine(facts.machine),
        *_not_read(facts),
    )


def examine_together(nodes: Mapping[str, NodeFacts]) -> tuple[Finding, ...]:
    """Whether all nodes of a cluster have the same libraries."""
    findings = []
    for library in ("torch", "transformers"):
        by_version: dict[str, list[str]] = {}
        for node, facts in nodes.items():
            by_version.setdefault(facts.versions.get(library, "none"), []).append(node)
        says = "; ".join(f"{version} on {', '.join(names)}" for version, names in sorted(by_version.items()))
        remedy = "install one version on all nodes"
        findings.append(_finding(f"{library} everywhere", says, remedy, warning=len(by_version) > 1))
    return tuple(findings)


def _versions(versions: Mapping[str, str]) -> Iterator[Finding]:
    """Against the requirements of this installation."""
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    wanted = {"python": SpecifierSet(metadata.metadata("helixbench")["Requires-Python"] or "")}
    for text in metadata.requires("helixbench") or ():
        requirement = Requirement(text)
        wanted[requirement.name] = wanted.get(requirement.name, SpecifierSet()) & requirement.specifier
    for library in ("python", *LIBRARIES):
        found, need = versions.get(library), wanted[library]
        remedy = f"pip install '{library}{need}'" if library != "python" else "use a Python in that range"
        if found is None:
            yield Finding(library, "problem", "not installed", remedy)
        elif need.contains(found, prereleases=True):
            yield Finding(library, "ok", found)
        else:
            yield Finding(library, "problem", f"{found}, need {need}", remedy)


def _gpu(device: Device) -> Iterator[Finding]:
    """What slows a GPU down, or takes its memory."""
    facts, gpu = device.facts, device.name
    check = f"gpu {facts.get('uuid', '')}".strip()
    if "driver" not in facts:
        says = f"{gpu}: NVML {facts.get('nvml', 'does not name the driver')}"
        yield Finding(check, "problem", says, "reload the driver until nvidia-smi works; pip install nvidia-ml-py")
        return
    celsius, errors, used, total = (
        _number(facts, name)
        for name in (
            "temperature_celsius",
            "uncorrected_memory_errors",
            "nvml_memory_used_bytes",
            "memory_total_bytes",
        )
    )
    at = "" if celsius is None else f" at {celsius:.0f} °C"
    yield Finding(check, "ok", f"{gpu}, driver {facts['driver']}{at}")
    for reason in str(facts.get("throttle_reasons", "")).split(", "):
        if reason in THROTTLING:
            state, words = THROTTLING[reason]
            remedy = "look at cooling, power supply and power limit (nvidia-smi -q -d PERFORMANCE)"
            yield Finding(check, state, f"{gpu} is throttled by {words}{at}", remedy)
    if errors:
        says = f"{gpu} has had {errors:.0f} uncorrected memory errors since its start"
        yield Finding(check, "problem", says, "reset it; replace it when they return (nvidia-smi -q -d ECC)")
    if used is not None and total is not None and used > USED_GPU_MEMORY * total:
        says = f"{used / GB:.1f} of {total / GB:.1f} GB of {gpu} are in use"
        yield Finding(check, "warning", says, "end what uses it (nvidia-smi), or give the agent less --memory")
    if facts.get("persistence") == "off":
        says = f"{gpu}: persistence mode is off"
        yield Finding(check, "warning", says, "nvidia-smi -pm 1, or run nvidia-persistenced")
    if facts.get("mig") == "on":
        remedy = "give each agent one instance: CUDA_VISIBLE_DEVICES=MIG-UUID (nvidia-smi -L)"
        yield Finding(check, "warning", f"{gpu} is divided (MIG)", remedy)


def _iperf3(found: str) -> Finding:
    from packaging.version import InvalidVersion, Version

    newer = "install iperf3 3.18 or newer"
    if not found:
        says = "not installed: bandwidth is measured over the server's own transport"
        return Finding("iperf3", "warning", says, newer)
    try:
        version = Version(found)
    except InvalidVersion:
        return Finding("iperf3", "warning", f"version {found!r} is not understood", newer)
    for since, until, state, defect in IPERF3_DEFECTS:
        if Version(since) <= version < Version(until):
            return Finding("iperf3", state, f"{found}: {defect}", newer)
    return Finding("iperf3", "ok", found)


def _cpu(machine: Facts) -> Iterator[Finding]:
    names = ("logical_cores", "usable_cores", "cpu_quota_cores", "load_1min")
    logical, usable, quota, load = (_number(machine, name) for name in names)
    if logical is None:
        return
    cores = min(count for count in (logical, usable, quota) if count is not None)
    says = f"may use {cores:g} of {logical:g} cores"
    remedy = "affinity or a quota holds it back: raise it, or count on that many only"
    yield _finding("cores", says, remedy, warning=cores < logical)
    if "governor" in machine:
        is_slow = machine["governor"] != "performance"
        yield _finding("governor", str(machine["governor"]), "cpupower frequency-set -g performance", warning=is_slow)
    if load is not None:
        remedy = "timings will be noisy: end what else runs (top), or wait"
        yield _finding("load", f"{load:.1f} on {cores:g} cores", remedy, warning=load > BUSY_LOAD * cores)


def _machine(machine: Facts) -> Iterator[Finding]:
    """Memory, disk, open files and clock; nothing on what the system does not state."""
    memory = [_number(machine, name) for name in ("memory_available_bytes", "memory_limit_bytes")]
    if stated := [count for count in memory if count is not None]:
        is_little = min(stated) < MIN_MEMORY_BYTES
        remedy = "end what uses it, or raise the limit of its group"
        yield _finding("memory", f"{min(stated) / GB:.2f} GB available", remedy, problem=is_little)
    if (disk := _number(machine, "disk_free_bytes")) is not None:
        says = f"{disk / GB:.1f} GB free in {machine.get('temporary_folder')}"
        is_full, is_low = disk < MIN_FREE_DISK_BYTES, disk < LOW_FREE_DISK_BYTES
        yield _finding("disk", says, "make room, or set TMPDIR to another disk", problem=is_full, warning=is_low)
    if (files := _number(machine, "max_open_files")) is not None:
        remedy = "ulimit -n 65536: each HTTP client and each link takes one"
        yield _finding("open files", f"{files:.0f} at most", remedy, warning=files < MIN_OPEN_FILES)
    if "clock_synchronised" in machine:
        remedy = "dates in records may be off, durations are not: run chrony or ntpd"
        is_kept = machine["clock_synchronised"] == "yes"
        yield _finding("clock", "synchronised" if is_kept else "not synchronised", remedy, warning=not is_kept)


def _not_read(facts: NodeFacts) -> Iterator[Finding]:
    for part in (facts.machine, *(device.facts for device in facts.devices)):
        if NOT_READ in part:
            yield Finding("facts", "warning", f"not read: {part[NOT_READ]}", "report it; all other facts were read")


def _number(facts: Facts, name: str) -> float | None:
    value = facts.get(name)
    return float(value) if isinstance(value, int | float) else None
