"""Compare two cluster profiles: devices, versions, stage times and links, each against its own noise. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import msgspec

from helixbench.profiler.cluster import ClusterProfile, Link, Node
from helixbench.profiler.cost.measured import CostSample, MeasuredCost
from helixbench.profiler.cost.model import BatchShape
from helixbench.reports.compare.change import Change, computed, quantity, statement
from helixbench.reports.formatting import bit_rate, link_name, seconds, size
from helixbench.reports.verdict.verdict import Interval

# Half-width of a 95 % interval in standard errors, for a mean over many batches.
CONFIDENCE_DEVIATIONS = 1.96
# Of a normal distribution: half the interquartile range in standard deviations, and the standard error of the median
# over that of the mean.
NORMAL_HALF_IQR = 0.6745
MEDIAN_EFFICIENCY = 1.2533
# Relative difference between two measurements of one link that is noise.
LINK_NOISE = 0.05
# What the scheduler of a busy host adds to a round trip.
LATENCY_NOISE_S = 2e-4
# The peak memory of one iteration varies by what the allocator and libraries keep.
WORKSPACE_NOISE = 0.05
WORKSPACE_NOISE_BYTES = 1e6
# Without common samples, fitted stage times are compared at this batch.
REFERENCE_DECODES = 8
REFERENCE_CONTEXT_TOKENS = 128

# Facts that describe the moment of the query: another value is not a change of the device.
MOMENTARY_FACTS = frozenset(
    {
        "temperature_celsius",
        "sm_frequency_hz",
        "frequency_hz",
        "throttle_reasons",
        "uncorrected_memory_errors",
        "nvml_memory_used_bytes",
        "pcie_generation",
        "not_read",
    }
)

BATCHES: dict[str, Callable[[CostSample], bool]] = {
    "decode": lambda s: s.num_layers > 0 and s.batch.prefill_chunks == 0,
    "prefill": lambda s: s.num_layers > 0 and s.batch.decode_tokens == 0,
    "mixed": lambda s: s.num_layers > 0 and s.batch.prefill_chunks > 0 and s.batch.decode_tokens > 0,
    "embedding": lambda s: s.first,
    "head": lambda s: s.last,
}


class CostRatio(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """New / base time of one kind of batch, over ``num_batches`` that both profiles measured."""

    ratio: float
    interval: Interval
    num_batches: int


def profile_notes(base: ClusterProfile, new: ClusterProfile) -> Iterator[str]:
    """What limits the comparison."""
    if base.model != new.model:
        yield f"profiled for different models: {base.model.name} and {new.model.name}"
    if base.testbed != new.testbed:
        yield f"testbed differs: {base.testbed or 'none'} and {new.testbed or 'none'}"


def profile_changes(base: ClusterProfile, new: ClusterProfile) -> Iterator[Change]:
    """Every quantity of both profiles."""
    for field in base.model.__struct_fields__:
        yield statement(f"model: {field}", getattr(base.model, field), getattr(new.model, field))
    versions = base.provenance.versions, new.provenance.versions
    for name in sorted(versions[0].keys() | versions[1].keys()):
        yield statement(name, *(version.get(name) for version in versions))
    before, after = ({node.name: node for node in profile.nodes} for profile in (base, new))
    for name in sorted(before.keys() | after.keys()):
        if name in before and name in after:
            yield from _node_changes(before[name], after[name])
        else:
            yield statement(name, *("present" if name in nodes else "absent" for nodes in (before, after)))
    for src, dst in sorted({(link.src, link.dst) for profile in (base, new) for link in profile.links}):
        yield from _link_changes(link_name(src, dst), base.link(src, dst), new.link(src, dst))
    for name in ("message_s", "token_s", "request_s"):
        a, b = getattr(base.coordinator, name), getattr(new.coordinator, name)
        if a and b:
            yield quantity(f"coordinator: {name}", a, b, is_higher_better=False)


def cost_ratios(base: MeasuredCost, new: MeasuredCost) -> dict[str, CostRatio]:
    """Kind of batch -> new / base time over the batches that both profiles measured.

    The interval is from the larger of two variances, that of the samples' own spread and that of the ratios among
    themselves, plus the drift during either profile, which all of its samples share.
    """
    of_base = {(s.num_layers, s.first, s.last, s.batch): s for s in base.samples}
    keyed = (((s.num_layers, s.first, s.last, s.batch), s) for s in new.samples)
    common = [(of_base[key], sample) for key, sample in keyed if key in of_base]
    drift = math.hypot(_drift(base), _drift(new))
    pairs = {name: [(a, b) for a, b in common if belongs(a)] for name, belongs in BATCHES.items()}
    return {name: _cost_ratio(own, drift) for name, own in pairs.items() if own}


def _cost_ratio(pairs: list[tuple[CostSample, CostSample]], drift: float) -> CostRatio:
    logs = [math.log(b.median_s / a.median_s) for a, b in pairs]
    n, mean = len(logs), math.fsum(logs) / len(logs)
    by_spread = math.fsum(_median_variance(a) + _median_variance(b) for a, b in pairs) / n**2
    among = math.fsum((value - mean) ** 2 for value in logs) / max(1, n - 1) / n
    half = CONFIDENCE_DEVIATIONS * math.sqrt(max(by_spread, among)) + drift
    return CostRatio(math.exp(mean), Interval(math.exp(mean - half), math.exp(mean + half)), n)


def _median_variance(sample: CostSample) -> float:
    """Squared relative standard error of a sample's median, from the spread of its blocks."""
    return (MEDIAN_EFFICIENCY * sample.spread / NORMAL_HALF_IQR) ** 2 / sample.repeats


def _drift(cost: MeasuredCost) -> float:
    drift = () if cost.quality is None else cost.quality.drift
    return max((abs(math.log(value)) for value in drift), default=0.0)


def _node_changes(base: Node, new: Node) -> Iterator[Change]:
    name = base.name
    yield statement(f"{name}: device", *(f"{node.device.kind} {node.device.name}" for node in (base, new)))
    facts = base.device.facts, new.device.facts
    for fact in sorted((facts[0].keys() | facts[1].keys()) - MOMENTARY_FACTS):
        yield statement(f"{name}: {fact}", *(known.get(fact) for known in facts))
    for library in sorted(base.versions.keys() | new.versions.keys()):
        yield statement(f"{name}: {library}", base.versions.get(library), new.versions.get(library))
    yield statement(f"{name}: memory", size(base.device.memory_bytes), size(new.device.memory_bytes))
    yield statement(f"{name}: layers that fit", base.max_layers, new.max_layers)
    if base.cost is not None and new.cost is not None:
        yield from _cost_changes(name, base.cost, new.cost, num_layers=min(base.max_layers, new.max_layers))
    elif base.capacity_tokens_per_s and new.capacity_tokens_per_s:
        tables = base.capacity_tokens_per_s, new.capacity_tokens_per_s
        yield computed(f"{name}: capacity with one layer", *(table[0] for table in tables))
        yield computed(f"{name}: capacity with all layers that fit", *(table[-1] for table in tables))
    else:
        yield statement(f"{name}: cost", *("measured" if node.cost else "a capacity table" for node in (base, new)))


def _cost_changes(name: str, base: MeasuredCost, new: MeasuredCost, *, num_layers: int) -> Iterator[Change]:
    ratios = cost_ratios(base, new)
    for kind, found in ratios.items():
        yield quantity(
            f"{name}: time of {kind} batches",
            1.0,
            found.ratio,
            is_higher_better=False,
            interval=found.interval,
            texts=("1", f"{found.ratio:.3f} over {found.num_batches} batches"),
        )
    if not ratios:
        a, b = (_reference_time_s(cost, num_layers) for cost in (base, new))
        noise = math.hypot(base.held_out_error_p90, new.held_out_error_p90)
        yield _noisy(f"{name}: time of {REFERENCE_DECODES} decodes", a, b, noise=noise, texts=(seconds(a), seconds(b)))
    a, b = base.workspace_bytes, new.workspace_bytes
    noise = max(WORKSPACE_NOISE, WORKSPACE_NOISE_BYTES / a) if a else 0.0
    yield _noisy(f"{name}: workspace", a, b, noise=noise, texts=(size(a), size(b)))


def _reference_time_s(cost: MeasuredCost, num_layers: int) -> float:
    batch = BatchShape(
        decode_tokens=REFERENCE_DECODES,
        decode_context_tokens=REFERENCE_DECODES * REFERENCE_CONTEXT_TOKENS,
        sampled_tokens=REFERENCE_DECODES,
    )
    return cost.stage.time_s(num_layers=num_layers, batch=batch, first=False, last=False)


def _link_changes(name: str, base: Link | None, new: Link | None) -> Iterator[Change]:
    if base is None or new is None:
        yield statement(name, *("connected" if link else "absent" for link in (base, new)))
        return
    a, b = base.bandwidth_bytes_per_s, new.bandwidth_bytes_per_s
    texts = bit_rate(a), bit_rate(b)
    yield _noisy(f"{name}: bandwidth", a, b, noise=LINK_NOISE, texts=texts, is_higher_better=True)
    a, b = base.latency_s, new.latency_s
    noise = max(LINK_NOISE, LATENCY_NOISE_S / a) if a else 0.0
    yield _noisy(f"{name}: latency", a, b, noise=noise, texts=(seconds(a), seconds(b)))


def _noisy(
    name: str, base: float, new: float, *, noise: float, texts: tuple[str, str], is_higher_better: bool = False
) -> Change:
    """A quantity whose ratio may be off by a share ``noise``."""
    found = new / base if base else None
    interval = Interval(found / (1 + noise), found * (1 + noise)) if found is not None and noise else None
    return quantity(name, base, new, is_higher_better=is_higher_better, interval=interval, texts=texts)
