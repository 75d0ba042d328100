from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helixbench.errors import InputError
from helixbench.reference_server.testbed import isolation, realtime, spec, wiring
from helixbench.reference_server.testbed import namespaces as netns
from helixbench.reference_server.testbed.cpu import CpuController
from tests.reference_server.testbed.beds import MBIT, small_spec


def remote_spec(*addresses: str) -> spec.TestbedSpec:
    nodes = tuple(spec.RemoteNode(name=f"far{index}", address=address) for index, address in enumerate(addresses))
    return spec.TestbedSpec(
        local_nodes=(spec.LocalNode(name="here", cpu=0.1, memory_bytes=1e6, bandwidth_bytes_per_s=MBIT),),
        remote_nodes=nodes,
        node_names=("here", *(node.name for node in nodes)),
    )


def test_link_limit_holds_at_both_ends() -> None:
    link = spec.LinkCap(between=("big", "coordinator"), bandwidth_bytes_per_s=8 * MBIT)

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
    plain = isolation.Isolation(controller=None, no_quota="not root", no_namespaces="not root")

    said = isolation.describe(bed, plain)

    assert "CPU EMULATED by idling" in said
    assert "links NOT SHAPED (not root)" in said
    assert "1 node at an address" in said


@pytest.mark.parametrize(
    ("no_realtime", "said"),
    [("", "messages wake nodes at once"), ("Invalid argument", "messages wake nodes only in turn (Invalid argument)")],
)
def test_description_says_whether_messages_wake_nodes_at_once(no_realtime: str, said: str) -> None:
    bed = spec.TestbedSpec(
        local_nodes=(spec.LocalNode(name="n", cpu=0.3, memory_bytes=1e6),), node_names=("n",), coordinator_cpu=0.3
    )
    group = Path("/sys/fs/cgroup")
    paced = isolation.Isolation(controller=CpuController(1, group, group), no_realtime=no_realtime)
    assert said in isolation.describe(bed, paced)


@given(num_nodes=st.integers(1, 1000))
def test_nobody_is_granted_what_another_was(num_nodes: int) -> None:
    granted = realtime.MOST_COORDINATOR + num_nodes * realtime.node_grant(num_nodes)
    assert realtime.node_grant(num_nodes) > 0
    assert granted <= realtime.TOTAL + 1e-9


def test_nodes_stay_in_the_machines_network_where_remote_ones_need_them() -> None:
    found = isolation.find_isolation(None, trial_group=None, has_remote_nodes=True)

    assert not found.has_namespaces
    assert not found.is_full
