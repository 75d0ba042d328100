import re

import pytest

from helixbench.reference_server.testbed import shaping

MBIT = 1e6 / 8


def rates(lines: list[str]) -> dict[str, tuple[int, int]]:
    """Class -> its own rate and its ceiling, bits per second."""
    found = (re.search(r"classid (\S+) htb rate (\d+)bit ceil (\d+)bit", line) for line in lines)
    return {match[1]: (int(match[2]), int(match[3])) for match in found if match}


def test_no_limit_needs_no_command() -> None:
    assert shaping.egress_commands("eth0", card_bytes_per_s=None) == []


def test_own_rates_add_up_to_the_card_and_ceilings_are_the_limits() -> None:
    lines = shaping.egress_commands(
        "eth0", card_bytes_per_s=400 * MBIT, peer_bytes_per_s={"10.0.0.2": 80 * MBIT, "10.0.0.3": 900 * MBIT}
    )

    classes, headers = rates(lines), 9014 / 8948
    assert classes["1:1"] == pytest.approx((400e6 * headers, 400e6 * headers))
    ceilings = [classes[name][1] for name in ("1:10", "1:11", "1:12")]
    assert ceilings == pytest.approx([400e6 * headers, 80e6 * headers, 400e6 * headers])
    assert sum(classes[name][0] for name in ("1:10", "1:11", "1:12")) == pytest.approx(400e6 * headers)
    assert any(line.endswith("match ip dst 10.0.0.2/32 flowid 1:11") for line in lines)
    assert "default 10" in lines[0]


def test_link_limit_without_card_limit_leaves_the_rest_alone() -> None:
    lines = shaping.egress_commands("eth0", card_bytes_per_s=None, peer_bytes_per_s={"10.0.0.2": 3 * MBIT})

    assert rates(lines) == {"1:11": pytest.approx((3e6 * 590 / 524, 3e6 * 590 / 524))}
    assert "default 0" in lines[0]


def test_frames_are_short_on_slow_links_and_jumbo_on_fast_ones() -> None:
    assert [shaping.mtu_bytes(rate * MBIT) for rate in (1, 3, 10, 80, 2000)] == [576, 576, 1250, 9000, 9000]
    assert shaping.mtu_bytes(None) == 9000


def test_segments_are_one_frame_on_slow_links_and_whole_on_fast_ones() -> None:
    assert [shaping.frames_at_once(rate * MBIT) for rate in (1, 10, 80, 400, 2000)] == [1, 1, 1, 5, 7]
