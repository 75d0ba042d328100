"""A plan, a cluster and events that do not belong together are refused before anything runs."""

from __future__ import annotations

import msgspec
import pytest

from helixbench.errors import InputError
from helixbench.profiler.cluster import COORDINATOR, ClusterProfile, Link
from helixbench.records import digest
from helixbench.reference_server.simulation import simulate
from helixbench.reference_server.simulation.compatibility import OTHER_CLUSTER_NOTE, require_fit
from helixbench.solver.problem.plan import Plan
from helixbench.solver.simulation.events import Event, LinkChanges, NodeDies
from tests.reference_server.simulation.cases import closed, two_in_a_row
from tests.solver.clusters import table_node


def with_node(profile: ClusterProfile, name: str, **fields: object) -> ClusterProfile:
    nodes = tuple(msgspec.structs.replace(n, **fields) if n.name == name else n for n in profile.nodes)
    return msgspec.structs.replace(profile, nodes=nodes)


def refused(plan: Plan, profile: ClusterProfile, *events: Event) -> str:
    with pytest.raises(InputError) as caught:
        require_fit(plan, profile, closed(1, events=events), plan_file="p.json", cluster_file="c.json")
    with pytest.raises(InputError):
        simulate(plan, profile, closed(1, events=events))
    return str(caught.value)


def test_a_range_that_is_longer_than_the_node_holds_is_refused() -> None:
    profile, plan = two_in_a_row()
    require_fit(plan, with_node(profile, "a", max_layers=5), closed(1))
    assert refused(plan, with_node(profile, "a", max_layers=4)) == (
        "p.json: placement.a holds 5 layers, [0,5), but max_layers of a in c.json is 4; solve for this cluster"
    )


def test_a_range_that_is_longer_than_the_capacity_table_is_refused() -> None:
    profile, plan = two_in_a_row()
    short = msgspec.structs.replace(profile, nodes=(table_node("a", [9.0] * 4), profile.nodes[1]))
    assert "max_layers of a in c.json is 4, and its capacity_tokens_per_s has no more values" in refused(plan, short)


def test_kv_slots_that_the_node_has_no_room_for_are_refused() -> None:
    profile, plan = two_in_a_row()
    planned = plan.nodes["b"].kv_capacity_tokens
    device = profile.node("b").device
    smaller = msgspec.structs.replace(device, memory_bytes=device.memory_bytes - 3 * 100)  # one token on 3 layers
    assert refused(plan, with_node(profile, "b", device=smaller)) == (
        f"p.json: nodes.b.kv_capacity_tokens is {planned}, but beside [5,8) there is room for {(planned or 0) - 1} in "
        "device.memory_bytes of b in c.json; solve for this cluster"
    )


def test_a_model_with_other_layers_is_refused() -> None:
    profile, plan = two_in_a_row()
    deeper = msgspec.structs.replace(profile, model=msgspec.structs.replace(profile.model, num_layers=9))
    assert "p.json: num_layers is 8, but the model of c.json has 9" in refused(plan, deeper)


@pytest.mark.parametrize(
    ("event", "says"),
    [
        (LinkChanges(at_s=5.0, src="b", dst="a", factor=0.5), "at_s 5 names the link b -> a, which the cluster does"),
        (LinkChanges(at_s=5.0, src="a", dst="a", factor=0.5), "at_s 5 names the link a -> a, which the cluster does"),
        (LinkChanges(at_s=5.0, src="a", dst="z", factor=0.5), "at_s 5 names 'z', which the cluster does not have"),
        (NodeDies(at_s=5.0, node=COORDINATOR), "at_s 5 names 'coordinator', which the cluster does not have"),
    ],
)
def test_an_event_on_what_is_not_there_is_refused_before_the_run(event: Event, says: str) -> None:
    profile, plan = two_in_a_row()
    ends = [(COORDINATOR, "a"), ("a", "b"), ("b", COORDINATOR)]
    links = tuple(Link(src=src, dst=dst, bandwidth_bytes_per_s=1e7) for src, dst in ends)
    assert says in refused(plan, msgspec.structs.replace(profile, links=links, default_link=None), event)


def test_a_plan_of_another_profile_is_simulated_and_the_record_says_so() -> None:
    profile, plan = two_in_a_row()
    own = msgspec.structs.replace(plan, cluster_digest=digest(profile))
    other = with_node(profile, "a", region="elsewhere")
    assert simulate(own, profile, closed(1)).remarks == ()
    result = simulate(own, other, closed(1))
    assert result.remarks == (OTHER_CLUSTER_NOTE,)
    assert OTHER_CLUSTER_NOTE in result.run.testbed
