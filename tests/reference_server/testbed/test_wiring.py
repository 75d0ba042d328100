import msgspec
import pytest

from helixbench.errors import InputError
from helixbench.profiler.emulated_device import EmulatedDevice, Roofline
from helixbench.reference_server.testbed import isolation, spec, wiring
from helixbench.reference_server.testbed import namespaces as netns
from tests.reference_server.testbed.beds import MBIT, small_spec


def remote_spec(*addresses: str) -> spec.TestbedSpec:
    nodes = tuple(spec.RemoteNode(name=f"far{index}", address=address) for index, address in enumerate(addresses))
    return spec.TestbedSpec(
        local_nodes=(spec.LocalNode(name="here", memory_bytes=1e6, bandwidth_bytes_per_s=MBIT),),
        remote_nodes=nodes,
        node_names=("here", *(node.name for node in nodes)),
    )


def test_link_limit_holds_at_both_ends() -> None:
    link = spec.LinkSpec(between=("big", "coordinator"), bandwidth_bytes_per_s=8 * MBIT)

    coordinator, big, small = wiring.stations(
        small_spec(card=40 * MBIT, links=(link,)), {"coordinator": "c", "big": "b", "small": "s"}
    )

    assert coordinator.peer_bytes_per_s == {big.address: 8 * MBIT}
    assert big.peer_bytes_per_s == {coordinator.address: 8 * MBIT}
    assert small.peer_bytes_per_s == {}
    assert small.card_bytes_per_s == 40 * MBIT


def test_stations_have_addresses_of_their_own() -> None:
    addresses = [netns.station_address(index) for index in range(1000)]

    assert len(set(addresses)) == 1000
    assert not any(address.endswith((".0", ".255")) for address in addresses)


def test_nodes_listen_where_remote_ones_reach_them() -> None:
    assert wiring.shared_hosts(remote_spec("127.0.0.1:9000")) == {"coordinator": "127.0.0.1", "here": "127.0.0.1"}


def test_refuses_an_address_that_cannot_be_reached() -> None:
    with pytest.raises(InputError, match="address 255\\.255\\.255\\.255:9: cannot be reached"):
        wiring.shared_hosts(remote_spec("255.255.255.255:9"))


def test_description_says_what_is_not_real() -> None:
    bed = remote_spec("127.0.0.1:9000")
    plain = isolation.Isolation(no_namespaces="not root")

    said = isolation.describe(bed, plain)

    assert "links NOT SHAPED (not root)" in said
    assert "1 node at an address" in said


@pytest.mark.parametrize(("threads", "is_shared"), [(2, False), (3, True)])
def test_description_says_where_nodes_share_cores(
    monkeypatch: pytest.MonkeyPatch, threads: int, is_shared: bool
) -> None:
    monkeypatch.setattr(isolation, "available_cpus", lambda: 2.0)
    node = spec.LocalNode(name="n", memory_bytes=1e6, threads=threads)

    said = isolation.describe(spec.TestbedSpec(local_nodes=(node,), node_names=("n",)), isolation.Isolation())

    assert ("MORE THAN ITS 2 CORES" in said) == is_shared


def test_nodes_stay_in_the_machines_network_where_remote_ones_need_them() -> None:
    assert not isolation.find_isolation(remote_spec("127.0.0.1:9000")).has_namespaces


def test_rates_are_shaped_at_the_time_scale_and_told_in_the_devices_time() -> None:
    link = spec.LinkSpec(between=("big", "small"), bandwidth_bytes_per_s=8 * MBIT, latency_s=0.05)
    bed = msgspec.structs.replace(small_spec(card=40 * MBIT, links=(link,)), time_scale=4.0)

    _, big, small = wiring.stations(bed, {"coordinator": "c", "big": "b", "small": "s"})
    links = {(link.src, link.dst): link for link in wiring.shaped_links(bed)}

    assert big.card_bytes_per_s == 10 * MBIT
    assert big.peer_bytes_per_s == {small.address: 2 * MBIT}
    assert links["small", "big"].bandwidth_bytes_per_s == 8 * MBIT
    assert links["coordinator", "big"].bandwidth_bytes_per_s == 40 * MBIT
    assert (links["big", "small"].latency_s, links["coordinator", "big"].latency_s) == (0.05, 0.0)
    assert len(links) == 6
    assert wiring.latencies(bed) == {"big": {"small": 0.05}, "small": {"big": 0.05}}


def test_links_are_told_only_where_every_pair_is_limited() -> None:
    assert wiring.shaped_links(small_spec()) == ()


def test_description_says_what_is_emulated() -> None:
    roofline = Roofline(flops=1e12, memory_bandwidth_bytes_per_s=1e11, launch_s=0.0)
    device = EmulatedDevice(name="made-up", memory_bytes=1e9, roofline=roofline)
    node = spec.LocalNode(name="n", memory_bytes=1e6, emulated=device)
    link = spec.LinkSpec(between=("n", "coordinator"), latency_s=0.01)
    bed = spec.TestbedSpec(local_nodes=(node,), node_names=("n",), links=(link,), time_scale=4.0)

    said = isolation.describe(bed, isolation.Isolation())

    assert "EMULATED devices (1 made-up) at time scale 4" in said
    assert "latencies by holding messages at the receiving end" in said
    assert "on CPU" not in said
