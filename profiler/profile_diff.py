"""What changed between two profiles, and whether it is more than noise. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Literal

import msgspec

from helixbench.profiler.cluster import ClusterProfile, CostSample, Link, MeasuredCost, Node

Judgement = Literal["changed", "more than noise", "within noise"]

CONFIDENCE_DEVIATIONS = 1.96
"""Standard errors of a mean of many points to either side of it, at 95 %."""
NORMAL_HALF_IQR = 0.6745
"""Half the interquartile range of a normal distribution, in its standard deviations."""
MEDIAN_EFFICIENCY = 1.2533
"""Standard error of a median over that of a mean, for a normal distribution."""
LINK_NOISE = 0.05
"""Relative difference that two measurements of one link may have: what is promised of them."""
LATENCY_NOISE_S = 2e-4
"""Seconds that the scheduler of a busy host adds to a round trip or does not."""
WORKSPACE_NOISE = 0.05
"""Relative difference that the peak of one iteration may have: what the allocator and libraries keep varies."""
WORKSPACE_NOISE_BYTES = 1e6
EXACT = 1e-9

MOMENTARY_FACTS = frozenset(
    {
        "temperature_celsius",
        "sm_frequency_hz",
        "frequency_hz",
        "throttle_reasons",
        "nvml_memory_used_bytes",
        "pcie_generation",
    }
)
"""What a device said of the moment in which it was asked: another value is no change."""

BATCHES: dict[str, Callable[[CostSample], bool]] = {
    "decode": lambda s: s.num_layers > 0 and s.batch.prefill_chunks == 0,
    "prefill": lambda s: s.num_layers > 0 and s.batch.decode_tokens == 0,
    "mixed": lambda s: s.num_layers > 0 and s.batch.prefill_chunks > 0 and s.batch.decode_tokens > 0,
    "embedding": lambda s: s.first,
    "head": lambda s: s.last,
}


class Difference(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """One quantity in both profiles; for a number, new / base with the interval that noise alone explains around it.

    What is no measurement (a name, a version) is ``changed``.
    """

    name: str
    base: str
    new: str
    judgement: Judgement
    ratio: float | None = None
    low: float | None = None
    high: float | None = None


class CostRatio(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Time of one kind of batch, new / base: over ``num_points`` batches that both measured."""

    ratio: float
    low: float
    high: float
    num_points: int

    @property
    def is_noise(self) -> bool:
        """Whether the interval holds 1."""
        return self.low <= 1 <= self.high


def profile_differences(base: ClusterProfile, new: ClusterProfile) -> tuple[Difference, ...]:
    """All that is not the same, measured quantities also where noise explains it."""
    return tuple(_differences(base, new))


def cost_ratios(base: MeasuredCost, new: MeasuredCost) -> dict[str, CostRatio]:
    """Kind of batch -> its time in the new profile over the base, from the batches that both measured.

    The interval holds the larger of what the spread of each sample's blocks says and what the ratios of the batches
    say among themselves, and what either profile drifted while it was made, which all of its batches share.
    """
    return {
        name: _ratio([(a, b) for a, b in _common(base, new) if belongs(a)], _drift(base), _drift(new))
        for name, belongs in BATCHES.items()
        if any(belongs(a) for a, _ in _common(base, new))
    }


def lasting_facts(base: Node, new: Node) -> list[str]:
    """Names of what either device states, in order; without facts of the moment."""
    return sorted((base.device.facts.keys() | new.device.facts.keys()) - MOMENTARY_FACTS)


def _common(base: MeasuredCost, new: MeasuredCost) -> list[tuple[CostSample, CostSample]]:
    of_base = {(s.num_layers, s.first, s.last, s.batch): s for s in base.samples}
    keys = [((s.num_layers, s.first, s.last, s.batch), s) for s in new.samples]
    return [(of_base[key], sample) for key, sample in keys if key in of_base]


def _ratio(pairs: list[tuple[CostSample, CostSample]], *drifts: float) -> CostRatio:
    logs = [math.log(b.median_s / a.median_s) for a, b in pairs]
    mean = math.fsum(logs) / len(logs)
    by_blocks = math.fsum(_median_variance(a) + _median_variance(b) for a, b in pairs) / len(logs) ** 2
    among = math.fsum((value - mean) ** 2 for value in logs) / max(1, len(logs) - 1) / len(logs)
    half = CONFIDENCE_DEVIATIONS * math.sqrt(max(by_blocks, among)) + math.hypot(*drifts)
    return CostRatio(math.exp(mean), math.exp(mean - half), math.exp(mean + half), len(logs))


def _median_variance(sample: CostSample) -> float:
    """Squared relative standard error of a sample's median, from the spread of its blocks."""
    return (MEDIAN_EFFICIENCY * sample.spread / NORMAL_HALF_IQR) ** 2 / sample.repeats


def _drift(cost: MeasuredCost) -> float:
    drift = () if cost.quality is None else cost.quality.drift
    return max((abs(math.log(value)) for value in drift), default=0.0)


def _differences(base: ClusterProfile, new: ClusterProfile) -> Iterator[Difference]:
    for field in base.model.__struct_fields__:
        yield from _text(f"model: {field}", getattr(base.model, field), getattr(new.model, field))
    yield from _text("testbed", base.testbed, new.testbed)
    versions = base.provenance.versions.keys() | new.provenance.versions.keys()
    for name in sorted(versions):
        yield from _text(name, base.provenance.versions.get(name), new.provenance.versions.get(name))
    before, after = ({node.name: node for node in profile.nodes} for profile in (base, new))
    for name in sorted(before.keys() | after.keys()):
        if name in before and name in after:
            yield from _node(before[name], after[name])
        else:
            yield from _text(name, *("there" if name in nodes else "not there" for nodes in (before, after)))
    for src, dst in sorted({(link.src, link.dst) for profile in (base, new) for link in profile.links}):
        yield from _link(f"{src} -> {dst}", base.link(src, dst), new.link(src, dst))
    for name in ("message_s", "token_s", "request_s"):
        a, b = getattr(base.coordinator, name), getattr(new.coordinator, name)
        if a and b and abs(b / a - 1) > EXACT:
            texts = (f"{1e6 * a:.1f} us", f"{1e6 * b:.1f} us")
            yield Difference(name=f"coordinator: {name}", base=texts[0], new=texts[1], judgement="changed", ratio=b / a)


def _node(base: Node, new: Node) -> Iterator[Difference]:
    name = base.name
    yield from _text(
        f"{name}: device", f"{base.device.kind} {base.device.name}", f"{new.device.kind} {new.device.name}"
    )
    for fact in lasting_facts(base, new):
        yield from _text(f"{name}: {fact}", base.device.facts.get(fact), new.device.facts.get(fact))
    for library in sorted(base.versions.keys() | new.versions.keys()):
        yield from _text(f"{name}: {library}", base.versions.get(library), new.versions.get(library))
    memory = (f"{node.device.memory_bytes / 1e6:.1f} MB" for node in (base, new))
    yield from _text(f"{name}: memory", *memory)
    yield from _text(f"{name}: layers that fit", base.max_layers, new.max_layers)
    if base.cost is not None and new.cost is not None:
        for kind, found in cost_ratios(base.cost, new.cost).items():
            yield Difference(
                name=f"{name}: time of {kind} batches",
                base="1",
                new=f"{found.ratio:.3f} over {found.num_points} batches",
                judgement="within noise" if found.is_noise else "more than noise",
                ratio=found.ratio,
                low=found.low,
                high=found.high,
            )
        yield from _workspace(f"{name}: workspace", base.cost.workspace_bytes, new.cost.workspace_bytes)
    elif (base.cost is None) != (new.cost is None):
        yield from _text(f"{name}: cost", *("measured" if node.cost else "a table" for node in (base, new)))
    elif base.capacity_tokens_per_s != new.capacity_tokens_per_s:
        yield from _text(f"{name}: capacities", base.capacity_tokens_per_s, new.capacity_tokens_per_s)


def _workspace(name: str, a: float, b: float) -> Iterator[Difference]:
    if a != b:
        is_noise = abs(b - a) <= max(WORKSPACE_NOISE_BYTES, WORKSPACE_NOISE * a)
        yield Difference(
            name=name,
            base=f"{a / 1e6:.1f} MB",
            new=f"{b / 1e6:.1f} MB",
            judgement="within noise" if is_noise else "more than noise",
        )


def _link(name: str, base: Link | None, new: Link | None) -> Iterator[Difference]:
    if base is None or new is None:
        yield from _text(name, *("connected" if link else "not there" for link in (base, new)))
        return
    a, b = base.bandwidth_bytes_per_s, new.bandwidth_bytes_per_s
    low, high = b / a / (1 + LINK_NOISE), b / a * (1 + LINK_NOISE)
    if abs(b / a - 1) > EXACT:
        yield Difference(
            name=f"{name}: bandwidth",
            base=f"{8 * a / 1e6:.1f} Mbit/s",
            new=f"{8 * b / 1e6:.1f} Mbit/s",
            judgement="within noise" if low <= 1 <= high else "more than noise",
            ratio=b / a,
            low=low,
            high=high,
        )
    a, b = base.latency_s, new.latency_s
    if a != b:
        is_noise = abs(b - a) <= max(LATENCY_NOISE_S, LINK_NOISE * a)
        yield Difference(
            name=f"{name}: latency",
            base=f"{1e6 * a:.0f} us",
            new=f"{1e6 * b:.0f} us",
            judgement="within noise" if is_noise else "more than noise",
        )


def _text(name: str, base: object, new: object) -> Iterator[Difference]:
    if base != new:
        yield Difference(name=name, base=_said(base), new=_said(new), judgement="changed")


def _said(value: object) -> str:
    return "not said" if value is None or value == "" else f"{value:g}" if isinstance(value, float) else str(value)
