from __future__ import annotations

import random

import msgspec
import pytest

from helixbench.profiler.cluster import ClusterProfile, CostSample, Device, Link, MeasuredCost, ModelFacts, Node
from helixbench.profiler.cost.fit import fit_cost
from helixbench.profiler.measure.grid import GridPoint, grid
from helixbench.profiler.profile_diff import cost_ratios, profile_differences
from helixbench.profiler.quality import Quality

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


def test_one_profile_differs_in_nothing() -> None:
    made = profile(cost(noise=0.02))
    measured = [d for d in profile_differences(made, made) if d.ratio is None or abs(d.ratio - 1) > 1e-12]
    assert measured == []


def test_noise_is_called_noise_and_a_change_is_not() -> None:
    """As often as intervals of 95 % say; some of any forty miss."""
    noise = held = 0
    for seed in range(40):
        base = cost(noise=0.03, seed=seed)
        again, slower = cost(noise=0.03, seed=100 + seed), cost(factor=1.15, noise=0.03, seed=100 + seed)

        assert cost_ratios(base, again).keys() == {"decode", "prefill", "mixed", "embedding", "head"}
        noise += cost_ratios(base, again)["decode"].is_noise
        found = cost_ratios(base, slower)["decode"]
        assert not found.is_noise
        held += found.low < 1.15 < found.high
    assert noise >= 36
    assert held >= 36


def test_what_a_profile_drifted_is_noise_too() -> None:
    base, slower = cost(), cost(factor=1.05)
    assert not cost_ratios(base, slower)["decode"].is_noise
    assert cost_ratios(cost(drift=(1.0, 1.08)), slower)["decode"].is_noise


def test_device_versions_and_links_are_named() -> None:
    made = cost()
    found = {
        d.name: d for d in profile_differences(profile(made), profile(made, driver="2", bandwidth=0.8e6, torch="2.12"))
    }
    assert (found["a: driver"].base, found["a: driver"].new, found["a: driver"].judgement) == ("1", "2", "changed")
    assert found["b: torch"].new == "2.12"
    assert found["a -> b: bandwidth"].judgement == "more than noise"
    assert found["a -> b: bandwidth"].ratio == pytest.approx(0.8)
    within = profile_differences(profile(made), profile(made, bandwidth=0.97e6))
    assert [d.judgement for d in within if d.name == "a -> b: bandwidth"] == ["within noise"]


def test_facts_of_the_moment_are_no_change_and_a_lasting_one_is() -> None:
    def with_facts(**facts: str | float) -> ClusterProfile:
        made = profile(cost())
        device = msgspec.structs.replace(made.nodes[0].device, facts=facts)
        return msgspec.structs.replace(made, nodes=(msgspec.structs.replace(made.nodes[0], device=device),), links=())

    cool = with_facts(temperature_celsius=40.0, sm_frequency_hz=3e8, throttle_reasons="GpuIdle", frequency_hz=1e9)
    hot = with_facts(temperature_celsius=80.0, sm_frequency_hz=1.9e9, throttle_reasons="none", pcie_width=8.0)
    texts = {d.name for d in profile_differences(cool, hot) if d.judgement == "changed"}
    assert texts == {"a: pcie_width"}


@pytest.mark.parametrize(
    ("base", "new", "judgement"),
    [
        (1.0e6, 1.1e6, "within noise"),
        (500e6, 520e6, "within noise"),
        (500e6, 600e6, "more than noise"),
        (1e6, 3e6, "more than noise"),
    ],
)
def test_a_workspace_may_differ_by_a_little(base: float, new: float, judgement: str) -> None:
    made = (profile(msgspec.structs.replace(cost(), workspace_bytes=size)) for size in (base, new))
    found = {d.name: d.judgement for d in profile_differences(*made)}
    assert found["a: workspace"] == judgement


def test_grids_without_a_common_batch_say_nothing() -> None:
    base = cost()
    other = msgspec.structs.replace(
        base, samples=tuple(msgspec.structs.replace(s, num_layers=3) for s in base.samples[:9])
    )
    assert cost_ratios(base, other) == {}
