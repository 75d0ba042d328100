"""Whether a node is fit to be measured and to serve: facts in, findings out. Pure."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from helixbench.reference_server.doctor.facts import NodeFacts
from helixbench.reference_server.doctor.findings import GB, Finding, ok, problem, warning
from helixbench.reference_server.doctor.gpu_checks import examine_driver, examine_gpus
from helixbench.reference_server.doctor.versions import is_within, numbers

MIN_FREE_DISK_BYTES = 1 * GB
LOW_FREE_DISK_BYTES = 10 * GB
MIN_MEMORY_BYTES = 1 * GB
MIN_OPEN_FILES = 1024
BUSY_LOAD = 0.5  # of the cores: timings then share them
CLOCK_WARNING_S, CLOCK_PROBLEM_S = 0.1, 60.0


def examine(facts: NodeFacts) -> tuple[Finding, ...]:
    """All findings of one node."""
    checks: tuple[Callable[[NodeFacts], Iterator[Finding]], ...] = (
        _versions,
        examine_driver,
        examine_gpus,
        _iperf3,
        _ports,
        _permissions,
        _cpu,
        _memory,
        _disk,
        _open_files,
        _clock,
    )
    return tuple(finding for check in checks for finding in check(facts))


def _versions(facts: NodeFacts) -> Iterator[Finding]:
    if facts.requires_python and not is_within(facts.python, facts.requires_python):
        yield problem("python", f"{facts.python}, need {facts.requires_python}", "use a Python in that range")
    else:
        yield ok("python", facts.python)
    ranges = dict(_requirement(text) for text in facts.requirements)
    for library in ("torch", "transformers", "pyzmq"):
        version, wanted = facts.versions.get(library), ranges.get(library, "")
        install = f"pip install '{library}{wanted}'"
        if version is None:
            yield problem(library, "not installed", install)
        elif not is_within(version, wanted):
            yield problem(library, f"{version}, need {wanted}", install)
        else:
            yield ok(library, version)
    if facts.torch_problem:
        yield problem(
            "torch", f"cannot be imported: {facts.torch_problem}", "install it again, for this Python and CUDA"
        )


def _requirement(text: str) -> tuple[str, str]:
    """Name and bounds of a requirement as metadata tell it, without its marker."""
    match = re.match(r"[A-Za-z0-9._-]+", text)
    name = match[0] if match else text
    bounds = text[len(name) :].partition(";")[0].strip().strip("()")
    return name.lower(), ",".join(sorted(bounds.split(","), reverse=True)) if bounds else ""


def _iperf3(facts: NodeFacts) -> Iterator[Finding]:
    if facts.iperf3 is None:
        yield warning(
            "iperf3", "not installed: bandwidth is measured over the server's own transport", "install iperf3"
        )
        return
    version = numbers(facts.iperf3)
    newer = "install iperf3 3.18 or newer"
    # From the project's release notes and issue tracker.
    if version < (3, 2):
        yield problem("iperf3", f"{facts.iperf3} has no --connect-timeout", newer)
    elif version < (3, 5):
        yield problem("iperf3", f"{facts.iperf3} counts data that came after a test's end: rates too high", newer)
    elif version < (3, 10):
        yield warning("iperf3", f"{facts.iperf3}: some tests in reverse do not end", newer)
    elif (3, 16) <= version < (3, 18):
        yield warning("iperf3", f"{facts.iperf3}: crashes in its threads; 3.17 can print its JSON twice", newer)
    else:
        yield ok("iperf3", facts.iperf3)


def _ports(facts: NodeFacts) -> Iterator[Finding]:
    if facts.can_open_port:
        yield problem("ports", f"cannot listen on TCP: {facts.can_open_port}", "allow this process to open sockets")
    else:
        yield ok("ports", "a TCP port can be opened")


def _permissions(facts: NodeFacts) -> Iterator[Finding]:
    if facts.why_no_testbed:
        missing = [name for name in ("ip", "tc", "unshare") if name not in facts.programs]
        remedy = f"install {', '.join(missing)} (iproute2, util-linux)" if missing else "run as root with CAP_NET_ADMIN"
        yield warning(
            "testbeds", f"local ones run as plain processes, links not shaped: {facts.why_no_testbed}", remedy
        )
    else:
        yield ok("testbeds", "network namespaces with shaped links can be made")
    if facts.cgroup_version is None:
        yield warning(
            "cgroup",
            "no CPU controller: a testbed's CPU shares are emulated",
            "mount cgroup v2 with the cpu controller",
        )
    else:
        yield ok("cgroup", f"version {facts.cgroup_version}, with a CPU controller")


def _cpu(facts: NodeFacts) -> Iterator[Finding]:
    cores = facts.usable_cores
    is_busy = facts.load is not None and facts.load > BUSY_LOAD * cores
    slow = [name for name in facts.governors if name != "performance"]
    if slow:
        yield warning("cpu", f"frequency governor {', '.join(slow)}", "cpupower frequency-set -g performance")
    if cores < facts.logical_cores:
        yield warning(
            "cpu",
            f"may use {cores:g} of {facts.logical_cores} cores (affinity or quota of its group)",
            "raise the quota, or count on that many only",
        )
    if is_busy:
        yield warning(
            "cpu",
            f"load {facts.load:.1f} on {cores:g} cores: something else runs, timings will be noisy",
            "end it, or wait (top)",
        )
    if not slow and not is_busy and cores >= facts.logical_cores:
        yield ok("cpu", f"{facts.logical_cores} cores, governor {', '.join(facts.governors) or 'not told'}")


def _memory(facts: NodeFacts) -> Iterator[Finding]:
    told = [b for b in (facts.memory_available_bytes, facts.memory_limit_bytes) if b is not None]
    if not told:
        yield ok("memory", "not told by this system")
    elif min(told) < MIN_MEMORY_BYTES:
        yield problem(
            "memory", f"{min(told) / GB:.2f} GB free or allowed", "end what uses it, or raise the group's limit"
        )
    else:
        yield ok("memory", f"{min(told) / GB:.1f} GB free or allowed")


def _disk(facts: NodeFacts) -> Iterator[Finding]:
    free = facts.disk_free_bytes
    if free is None:
        return
    says = f"{free / GB:.1f} GB free in {facts.disk_folder}"
    remedy = "make room, or set TMPDIR to another disk"
    if free < MIN_FREE_DISK_BYTES:
        yield problem("disk", says, remedy)
    elif free < LOW_FREE_DISK_BYTES:
        yield warning("disk", says, remedy)
    else:
        yield ok("disk", says)


def _open_files(facts: NodeFacts) -> Iterator[Finding]:
    limit = facts.max_open_files
    if limit is not None and 0 <= limit < MIN_OPEN_FILES:
        yield warning("open files", f"{limit} at most", "ulimit -n 65536: each HTTP client and each link takes one")
    elif limit is not None:
        yield ok("open files", "no limit" if limit < 0 else f"{limit} at most")


def _clock(facts: NodeFacts) -> Iterator[Finding]:
    if facts.is_clock_synchronised is None:
        yield ok("clock", "this system does not say whether it is synchronised")
    elif facts.is_clock_synchronised:
        yield ok("clock", "synchronised (NTP)")
    else:
        yield warning("clock", "not synchronised: dates in records may be off, durations are not", "run chrony or ntpd")


def examine_clock(offset_s: float, uncertainty_s: float) -> Finding:
    """How far a node's wall clock is from the coordinator's."""
    says = f"{offset_s * 1e3:+.1f} ms from the coordinator's, known to ± {uncertainty_s * 1e3:.1f} ms"
    beyond_s = abs(offset_s) - uncertainty_s
    remedy = "synchronise both (chrony, ntpd)"
    if beyond_s > CLOCK_PROBLEM_S:
        return problem("clock offset", says, remedy)
    return warning("clock offset", says, remedy) if beyond_s > CLOCK_WARNING_S else ok("clock offset", says)


def examine_together(nodes: dict[str, NodeFacts]) -> tuple[Finding, ...]:
    """What has to be alike on all nodes of a cluster."""
    findings = []
    for library in ("torch", "transformers"):
        by_version: dict[str, list[str]] = {}
        for node, facts in nodes.items():
            by_version.setdefault(facts.versions.get(library, "none"), []).append(node)
        if len(by_version) > 1:
            says = "; ".join(f"{version} on {', '.join(names)}" for version, names in sorted(by_version.items()))
            findings.append(warning(f"{library} everywhere", says, "install one version on all nodes"))
        else:
            findings.append(ok(f"{library} everywhere", next(iter(by_version))))
    return tuple(findings)
