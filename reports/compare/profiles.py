"""Changes between two cluster profiles: model, versions, devices, costs, links. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import msgspec

from helixbench.profiler.cluster import ClusterProfile, CostSample, Link, MeasuredCost, Node
from helixbench.profiler.cost.model import BatchShape
from helixbench.reports.compare.changes import Change, exact, quantity, text, within
from helixbench.reports.render.text import bit_rate, link_name, seconds, size
from helixbench.reports.verdict.verdict import Interval

# Stage times of two profiles are compared at this batch: some sequences decoding, none prefilling.
REFERENCE_DECODES = 8
REFERENCE_CONTEXT_TOKENS = 128
CONFIDENCE_DEVIATIONS = 1.96  # standard errors of a mean of many points to either side of it, at 95 %
NORMAL_HALF_IQR = 0.6745  # half the interquartile range of a normal distribution, in standard deviations
MEDIAN_EFFICIENCY = 1.2533  # standard error of a median over that of a mean, for a normal distribution
LINK_NOISE = 0.05  # relative difference of two measurements of one link
LATENCY_NOISE_S = 2e-4  # that the scheduler of a busy host adds to a round trip
WORKSPACE_NOISE, WORKSPACE_NOISE_BYTES = 0.05, 1e6  # peak of one iteration: allocators and libraries vary

# Facts of the moment in which the device was asked: another value is no change.
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


class CostRatio(msgspec.Struct, frozen=True):
    """Time of one kind of batch, new / base, over ``num_points`` batches that both measured."""

    ratio: float
    interval: Interval
    num_points: int


def profile_notes(base: ClusterProfile, new: ClusterProfile) -> list[str]:
    """What makes the two hard to compare."""
    notes = []
    if base.model != new.model:
        notes.append(f"two models: {base.model.name} and {new.model.name}")
    if base.testbed != new.testbed:
        notes.append(f"testbed differs: {base.testbed or 'none'} and {new.testbed or 'none'}")
    return notes


def profile_changes(base: ClusterProfile, new: ClusterProfile) -> Iterator[Change]:
    """Everything in both profiles, changed or not."""
    for field in base.model.__struct_fields__:
        yield _fact(f"model: {field}", getattr(base.model, field), getattr(new.model, field))
    versions = base.provenance.versions, new.provenance.versions
    for name in sorted(versions[0].keys() | versions[1].keys()):
        yield _fact(name, versions[0].get(name), versions[1].get(name))
    before, after = ({node.name: node for node in profile.nodes} for profile in (base, new))
    for name in sorted(before.keys() | after.keys()):
        if name in before and name in after:
            yield from _node_changes(before[name], after[name])
        else:
            yield text(name, *("there" if name in nodes else "not there" for nodes in (before, after)))
    for src, dst in sorted({(link.src, link.dst) for profile in (base, new) for link in profile.links}):
        yield from _link_changes(link_name(src, dst), base.link(src, dst), new.link(src, dst))
    for name in ("message_s", "token_s", "request_s"):
        a, b = getattr(base.coordinator, name), getattr(new.coordinator, name)
        if a and b:
            yield quantity(f"coordinator: {name}", a, b, is_higher_better=False)


def _node_changes(base: Node, new: Node) -> Iterator[Change]:
    name, facts = base.name, (base.device.facts, new.device.facts)
    yield text(f"{name}: device", *(f"{node.device.kind} {node.device.name}" for node in (base, new)))
    yield text(f"{name}: memory", size(base.device.memory_bytes), size(new.device.memory_bytes))
    yield text(f"{name}: layers that fit", str(base.max_layers), str(new.max_layers))
    for fact in sorted((facts[0].keys() | facts[1].keys()) - MOMENTARY_FACTS):
        yield _fact(f"{name}: {fact}", facts[0].get(fact), facts[1].get(fact))
    for library in sorted(base.versions.keys() | new.versions.keys()):
        yield _fact(f"{name}: {library}", base.versions.get(library), new.versions.get(library))
    if base.cost is not None and new.cost is not None:
        yield from _cost_changes(base, new, base.cost, new.cost)
    elif (base.cost is None) != (new.cost is None):
        yield text(f"{name}: cost", *("measured" if node.cost else "a table" for node in (base, new)))
    tables = base.capacity_tokens_per_s or (), new.capacity_tokens_per_s or ()
    for layers, (a, b) in enumerate(zip(*tables, strict=False), start=1):
        yield quantity(f"{name}: capacity of {layers} layers", a, b, is_higher_better=True, interval=exact(a, b))


def _cost_changes(base: Node, new: Node, cost: MeasuredCost, new_cost: MeasuredCost) -> Iterator[Change]:
    name, num_layers = base.name, min(base.max_layers, new.max_layers)
    a, b = (_reference_time_s(measured, num_layers) for measured in (cost, new_cost))
    yield quantity(
        f"{name}: time of {REFERENCE_DECODES} decodes",
        a,
        b,
        is_higher_better=False,
        interval=within(a, b, math.hypot(cost.held_out_error_p90, new_cost.held_out_error_p90)),
        texts=(seconds(a), seconds(b)),
    )
    for kind, found in cost_ratios(cost, new_cost).items():
        yield quantity(
            f"{name}: time of {kind} batches",
            1.0,
            found.ratio,
            is_higher_better=False,
            interval=found.interval,
            texts=("1", f"{found.ratio:.3f} over {found.num_points} batches"),
        )
    a, b = cost.workspace_bytes, new_cost.workspace_bytes
    noise = max(WORKSPACE_NOISE, WORKSPACE_NOISE_BYTES / a) if a else 0.0
    interval = within(a, b, noise) if a and b else None
    texts = size(a), size(b)
    yield quantity(f"{name}: workspace", a, b, is_higher_better=False, interval=interval, texts=texts)


def _reference_time_s(cost: MeasuredCost, num_layers: int) -> float:
    batch = BatchShape(
        decode_tokens=REFERENCE_DECODES,
        decode_context_tokens=REFERENCE_DECODES * REFERENCE_CONTEXT_TOKENS,
        sampled_tokens=REFERENCE_DECODES,
    )
    return cost.stage.time_s(num_layers=num_layers, batch=batch, first=False, last=False)


def _link_changes(name: str, base: Link | None, new: Link | None) -> Iterator[Change]:
    if base is None or new is None:
        yield text(name, *("connected" if link else "not there" for link in (base, new)))
        return
    a, b = base.bandwidth_bytes_per_s, new.bandwidth_bytes_per_s
    yield quantity(
        f"{name}: bandwidth",
        a,
        b,
        is_higher_better=True,
        interval=within(a, b, LINK_NOISE),
        texts=(bit_rate(a), bit_rate(b)),
    )
    a, b = base.latency_s, new.latency_s
    interval = within(a, b, max(LINK_NOISE, LATENCY_NOISE_S / a)) if a and b else None
    yield quantity(f"{name}: latency", a, b, is_higher_better=False, interval=interval, texts=(seconds(a), seconds(b)))


def _fact(name: str, base: object, new: object) -> Change:
    return text(name, _said(base), _said(new))


def _said(value: object) -> str:
    return "not stated" if value is None or value == "" else f"{value:g}" if isinstance(value, float) else str(value)


def cost_ratios(base: MeasuredCost, new: MeasuredCost) -> dict[str, CostRatio]:
    """Kind of batch -> its time in the new profile over that in the base, from the batches that both measured.

    The interval is the larger of two estimates, one from the spread of each sample's blocks and one from the scatter of
    the ratios over batches, widened by the drift of either profile while it was made, which all its batches share.
    """
    return {
        name: _ratio([(a, b) for a, b in _common(base, new) if belongs(a)], _drift(base), _drift(new))
        for name, belongs in BATCHES.items()
        if any(belongs(a) for a, _ in _common(base, new))
    }


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
    return CostRatio(math.exp(mean), Interval(math.exp(mean - half), math.exp(mean + half)), len(logs))


def _median_variance(sample: CostSample) -> float:
    """Squared relative standard error of a sample's median, from the spread of its blocks."""
    return (MEDIAN_EFFICIENCY * sample.spread / NORMAL_HALF_IQR) ** 2 / sample.repeats


def _drift(cost: MeasuredCost) -> float:
    drift = () if cost.quality is None else cost.quality.drift
    return max((abs(math.log(value)) for value in drift), default=0.0)
