"""The table and the heat map of layers that were timed one by one."""

from __future__ import annotations

import msgspec
import pytest

from helixbench.profiler.cluster import ClusterProfile
from helixbench.profiler.cost.measured import IterationTime, LayerTimes, PartTime, Quality
from helixbench.reports.render.html import html_page
from helixbench.reports.render.layers import heat_maps, layer_sections
from tests.reports.report_examples import example_profile

BATCH = {"sequences": 8, "new_tokens": 1, "past_tokens": 1023}
TIMES = LayerTimes(
    clock="CUDA events",
    copy_bytes_per_s=2e12,
    gemm_flops_per_s=8e14,
    parts=(
        PartTime(part="layer", kind="window 512", **BATCH, median_s=1e-4, flops=4e9, num_bytes=1e8),
        PartTime(part="layer", kind="window 512", **BATCH | {"sequences": 64}, median_s=4e-4, flops=1e9, num_bytes=1e8),
        PartTime(
            part="layer", kind="window 512", **BATCH | {"past_tokens": 0}, median_s=2e-4, flops=1e9, num_bytes=1e8
        ),
        PartTime(part="layer", **BATCH, median_s=2e-4, flops=4e9, num_bytes=1e8),
        PartTime(part="sampling", **BATCH, median_s=5e-5, flops=0.0, num_bytes=4e6),
    ),
    iterations=(IterationTime(**BATCH, wall_s=3e-3, layers_s=1e-3),),
)


def profile_with_times() -> ClusterProfile:
    profile = example_profile()
    node = profile.nodes[0]
    assert node.cost is not None
    cost = msgspec.structs.replace(node.cost, quality=Quality(layer_times=TIMES))
    return msgspec.structs.replace(profile, nodes=(msgspec.structs.replace(node, cost=cost), *profile.nodes[1:]))


def test_each_part_stands_beside_what_the_device_can_do() -> None:
    (section,) = layer_sections(profile_with_times())
    assert section.title == "Layers of big"
    assert section.rows[0] == (
        "layer (window 512)", "decode 8 x 1024", "100 us", "1 TB/s", "50 %", "40 TFLOP/s", "5 %"
    )  # fmt: skip
    assert section.rows[3][0] == "layer"
    assert section.rows[4] == ("sampling", "8 rows", "50 us", "80 GB/s", "4 %", "", "")
    assert section.lines[0].endswith("2 TB/s, one large matrix product 800 TFLOP/s")
    assert "takes up to 2 ms (decode 8 x 1024)" in section.lines[1]


def test_a_map_has_one_place_for_each_batch_and_is_warmest_where_it_takes_longest() -> None:
    windowed, full = heat_maps(TIMES)
    assert (windowed.kind, windowed.sequences, windowed.contexts) == ("window 512", (8, 64), (1, 1024))
    assert (64, 1) not in windowed.seconds
    assert [windowed.warmth(took) for took in (1e-4, 2e-4, 4e-4)] == pytest.approx([0, 0.5, 1])
    assert full.warmth(2e-4) == 0


def test_the_page_has_the_map_and_profiles_without_times_have_none() -> None:
    page = html_page(profile_with_times())
    assert 'class="heat" data-node="big"' in page
    assert "--warmth:100%" in page
    assert 'class="heat"' not in html_page(example_profile())
    assert list(layer_sections(example_profile())) == []
