from __future__ import annotations

import random

import msgspec
import pytest

from helixbench.profiler.cluster import ClusterProfile, Coordinator, Device, Link, ModelFacts, Node
from helixbench.profiler.cost.fit import fit_cost
from helixbench.profiler.cost.measured import CostSample, MeasuredCost, Quality
from helixbench.profiler.measure.grid import GridPoint, grid
from helixbench.reports.compare.change import Change
from helixbench.reports.compare.profiles import cost_ratios, profile_changes

POINTS = grid(layer_counts=(4, 8), max_batch_tokens=64, max_context_tokens=256, max_kv_tokens=20_000)
MODEL = ModelFacts(
    name="toy",
    num_layers=8,
    activation_bytes_per_token=100.0,
    token_bytes=4.0,
    layer_weight_bytes=1e6,
    kv_bytes_per_token_per_layer=10.0,
)


def sample(point: GridPoint, factor: float, spread: float) -> CostSample:
    return CostSample(
        num_layers=point.num_layers,
        first=point.part == "embedding",
        last=point.part == "head",
        batch=point.shape,
        median_s=(1e-3 + point.num_layers * (1e-3 + 1e-5 * point.num_tokens)) * factor,
        spread=spread,
        repeats=5,
        held_out=point.held_out,
    )


def cost(*, factor: float = 1.0, noise: float = 0.0, seed: int = 0, drift: tuple[float, ...] = ()) -> MeasuredCost:
    draw = random.Random(seed)
    samples = [sample(point, factor * draw.gauss(1, noise), noise * 0.6745) for point in POINTS]
    made = fit_cost(samples, workspace_bytes=1e6, max_batch_tokens=64, source="made up")
    return msgspec.structs.replace(made, quality=Quality(drift=drift))


def profile(made: MeasuredCost, *, driver: str = "1", bandwidth: float = 1e6, torch: str = "2.11") -> ClusterProfile:
    device = Device(kind="cuda", name="X1", memory_bytes=1e8, facts={"driver": driver})
    nodes = tuple(
        Node(name=name, device=device, max_layers=8, cost=made, versions={"torch": torch}) for name in ("a", "b")
    )
    return ClusterProfile(model=MODEL, nodes=nodes, links=(Link(src="a", dst="b", bandwidth_bytes_per_s=bandwidth),))


def changes(base: ClusterProfile, new: ClusterProfile) -> dict[str, Change]:
    """By name, but for what did not change."""
    return {change.name: change for change in profile_changes(base, new) if change.judgement != "unchanged"}


def holds_one(base: MeasuredCost, new: MeasuredCost) -> bool:
    interval = cost_ratios(base, new)["decode"].interval
    return interval.low <= 1 <= interval.high


def test_one_profile_differs_in_nothing() -> None:
    made = profile(cost(noise=0.02))
    assert changes(made, made) == {}


def test_noise_is_called_noise_and_a_change_is_not() -> None:
    """As often as intervals of 95 % should; some of any forty miss."""
    noise = held = 0
    for seed in range(40):
        base = cost(noise=0.03, seed=seed)
        again, slower = cost(noise=0.03, seed=100 + seed), cost(factor=1.15, noise=0.03, seed=100 + seed)

        assert cost_ratios(base, again).keys() == {"decode", "prefill", "mixed", "embedding", "head"}
        noise += holds_one(base, again)
        assert not holds_one(base, slower)
        interval = cost_ratios(base, slower)["decode"].interval
        held += interval.low < 1.15 < interval.high
    assert noise >= 36
    assert held >= 36


def test_the_drift_of_a_profile_counts_as_noise() -> None:
    base, slower = cost(), cost(factor=1.05)
    assert not holds_one(base, slower)
    assert holds_one(cost(drift=(1.0, 1.08)), slower)


def test_slower_batches_are_worse() -> None:
    found = changes(profile(cost()), profile(cost(factor=1.15)))
    assert found["a: time of decode batches"].judgement == "worse"
    assert found["a: time of decode batches"].ratio == pytest.approx(1.15)
    assert found["a: time of decode batches"].new.startswith("1.150 over ")


def test_device_versions_and_links_are_named() -> None:
    made = cost()
    found = changes(profile(made), profile(made, driver="2", bandwidth=0.8e6, torch="2.12"))
    assert (found["a: driver"].base, found["a: driver"].new, found["a: driver"].judgement) == ("1", "2", "changed")
    assert found["b: torch"].new == "2.12"
    assert found["a → b: bandwidth"].judgement == "worse"
    assert found["a → b: bandwidth"].ratio == pytest.approx(0.8)
    within = changes(profile(made), profile(made, bandwidth=0.97e6))
    assert {change.judgement for change in within.values()} == {"within noise"}


@pytest.mark.parametrize(
    ("base_s", "new_s", "judgement"),
    [(1e-4, 2.5e-4, "within noise"), (10e-3, 10.4e-3, "within noise"), (1e-3, 2e-3, "worse"), (0.0, 1e-3, "changed")],
)
def test_a_latency_may_differ_by_what_a_busy_host_adds(base_s: float, new_s: float, judgement: str) -> None:
    first, second = (
        msgspec.structs.replace(
            profile(cost()), links=(Link(src="a", dst="b", bandwidth_bytes_per_s=1e6, latency_s=latency_s),)
        )
        for latency_s in (base_s, new_s)
    )
    assert changes(first, second)["a → b: latency"].judgement == judgement


def test_model_coordinator_and_absent_nodes_are_named() -> None:
    made = msgspec.structs.replace(profile(cost()), coordinator=Coordinator(message_s=1e-4))
    other = msgspec.structs.replace(
        made,
        model=msgspec.structs.replace(MODEL, dtype="bfloat16"),
        nodes=made.nodes[:1],
        links=(),
        coordinator=Coordinator(message_s=2e-4),
    )
    found = {name: (change.base, change.new) for name, change in changes(made, other).items()}
    assert found["model: dtype"] == ("none", "bfloat16")
    assert found["b"] == ("present", "absent")
    assert found["a → b"] == ("connected", "absent")
    assert "coordinator: message_s" in found


def test_facts_of_the_moment_are_no_change_and_a_lasting_one_is() -> None:
    def with_facts(**facts: str | float) -> ClusterProfile:
        made = profile(cost())
        device = msgspec.structs.replace(made.nodes[0].device, facts=facts)
        return msgspec.structs.replace(made, nodes=(msgspec.structs.replace(made.nodes[0], device=device),), links=())

    cool = with_facts(temperature_celsius=40.0, sm_frequency_hz=3e8, throttle_reasons="GpuIdle", frequency_hz=1e9)
    hot = with_facts(temperature_celsius=80.0, sm_frequency_hz=1.9e9, throttle_reasons="none", pcie_width=8.0)
    assert changes(cool, hot).keys() == {"a: pcie_width"}


@pytest.mark.parametrize(
    ("base", "new", "judgement"),
    [
        (1.0e6, 1.1e6, "within noise"),
        (500e6, 520e6, "within noise"),
        (500e6, 600e6, "worse"),
        (1e6, 3e6, "worse"),
        (600e6, 500e6, "better"),
    ],
)
def test_a_workspace_may_differ_by_a_little(base: float, new: float, judgement: str) -> None:
    first, second = (profile(msgspec.structs.replace(cost(), workspace_bytes=size)) for size in (base, new))
    assert changes(first, second)["a: workspace"].judgement == judgement


def test_profiles_without_common_batches_are_compared_by_their_fits() -> None:
    base = cost()
    other = msgspec.structs.replace(
        base, samples=tuple(msgspec.structs.replace(s, num_layers=3) for s in base.samples[:9])
    )
    assert cost_ratios(base, other) == {}
    assert "a: time of 8 decodes" in {change.name for change in profile_changes(profile(base), profile(other))}
