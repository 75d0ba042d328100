from __future__ import annotations

import pytest

from helixbench.errors import MeasurementError
from helixbench.profiler.cluster import Link, MessageTime
from helixbench.profiler.network.message_times import bytes_per_s, misses, model_s, ratios
from helixbench.profiler.network.records import MeasuredLink, NetworkProfile
from helixbench.records import decode_record, encode_record


def link(src: str, *times: tuple[int, float]) -> Link:
    """1 MB/s and 1 ms."""
    return Link(
        src=src,
        dst="z",
        bandwidth_bytes_per_s=1e6,
        latency_s=1e-3,
        message_times=tuple(MessageTime(size, seconds) for size, seconds in times),
    )


def test_a_link_as_the_model_has_it_misses_nowhere() -> None:
    good = link("a", *((size, model_s(1e-3, 1e6, size)) for size in (100, 10_000, 10**6)))
    assert [ratio for _, ratio in ratios(good)] == pytest.approx([1.0] * 3)
    assert misses([good]) == []


def test_the_worst_size_of_each_link_is_named_the_worst_link_first() -> None:
    late = link("late", (1000, 2e-3), (9000, 40e-3), (99_000, 0.2))
    early = link("early", (1000, 0.2e-3))
    found = misses([late, link("good", (1000, 2.1e-3)), early])
    assert [(miss.src, miss.message_bytes) for miss in found] == [("early", 1000), ("late", 9000)]
    assert [miss.ratio for miss in found] == pytest.approx([0.1, 4.0])


def test_the_largest_message_gives_a_rough_rate() -> None:
    assert bytes_per_s((MessageTime(2000, 0.01), MessageTime(10, 0.001))) == 2e5
    assert bytes_per_s(()) is None


def measured(**changes: object) -> MeasuredLink:
    fields = {"src": "a", "dst": "b", "bandwidth_bytes_per_s": 5.0, "latency_s": 0.1, "source": "x"} | changes
    return MeasuredLink(**fields)  # type: ignore[arg-type]


def test_a_measured_link_becomes_one_of_a_cluster_profile_or_says_why_not() -> None:
    whole = measured(message_times=(MessageTime(1, 0.2),), suspect="odd").link()
    assert (whole.bandwidth_bytes_per_s, whole.latency_s, whole.suspect) == (5.0, 0.1, "odd")
    assert whole.message_times == (MessageTime(1, 0.2),)
    with pytest.raises(MeasurementError, match="link a -> b: unable to connect"):
        measured(bandwidth_bytes_per_s=None, suspect="unable to connect").link()


def test_a_network_profile_is_read_as_it_was_written() -> None:
    profile = NetworkProfile(nodes=("a", "b"), links=(measured(), measured(src="b", dst="a")), cut_short="x")
    assert decode_record(encode_record(profile), NetworkProfile, origin="x") == profile
    assert profile.link("b", "a") == profile.links[1]
    assert profile.link("a", "c") is None
