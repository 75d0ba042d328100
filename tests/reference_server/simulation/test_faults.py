"""Nodes die, freeze, slow down, drain and come back in a simulation: what is served goes on as in a server."""

from __future__ import annotations

import random

import msgspec
import pytest

from helixbench.reference_server.run_log import RunLog
from helixbench.reference_server.simulation import SimulationConfig, simulate
from helixbench.solver.simulation.events import (
    Event,
    LinkCut,
    LinkHeals,
    NodeDies,
    NodeDrains,
    NodeFreezes,
    NodeJoins,
    NodeResumes,
    NodeSlows,
)
from tests.reference_server.simulation.cases import MIXED, OFFLINE, closed, cluster, plan_of

# 8 layers; every layer is held by two nodes at least
SPEEDS = {"a": 2.0, "b": 1.0, "c": 2.0, "d": 1.5, "e": 1.0}
PLACEMENT = {"a": (0, 5), "b": (0, 3), "c": (3, 8), "d": (5, 8), "e": (0, 8)}
PATHS = [(["a", "d"], 100.0), (["b", "c"], 100.0), (["e"], 50.0)]


def run(config: SimulationConfig, *events: Event) -> RunLog:
    profile = cluster(SPEEDS)
    plan = plan_of(profile, PLACEMENT, PATHS)
    return simulate(plan, profile, msgspec.structs.replace(config, events=events)).run


LONG = msgspec.structs.replace(closed(24), workload=MIXED, num_requests=None, duration_s=120.0, warmup_s=5.0)


def test_after_a_loss_the_rest_serves_what_is_predicted() -> None:
    log = run(LONG, NodeDies(at_s=40.0, node="b"), NodeJoins(at_s=80.0, node="b")).adaptation

    killed, joined = log.events
    assert (killed.detected_s, joined.detected_s) == (0.0, 0.0)
    for event in (killed, joined):
        assert event.after_tokens_per_s == pytest.approx(event.predicted_tokens_per_s, rel=0.1)
    assert killed.after_tokens_per_s is not None
    assert killed.before_tokens_per_s is not None
    assert killed.after_tokens_per_s < killed.before_tokens_per_s
    (recovered,) = log.recovered
    assert recovered.replayed + recovered.prefilled + recovered.waited > 0
    assert recovered.layer_tokens_again < recovered.layer_tokens_held


def test_a_slow_node_gets_fewer_requests() -> None:
    log = run(LONG, NodeSlows(at_s=40.0, node="a", factor=3.0)).adaptation

    assert [(t.after, t.cause) for t in log.transitions] == [("slow", "measured over predicted iteration time")]
    assert log.reweighted, "weights follow"
    assert log.events[0].after_tokens_per_s == pytest.approx(log.events[0].predicted_tokens_per_s, rel=0.15)


def test_a_drained_node_has_nothing_left_and_loses_nothing() -> None:
    log = run(LONG, NodeDrains(at_s=40.0, node="c"), NodeDies(at_s=100.0, node="c")).adaptation

    assert [t.after for t in log.transitions] == ["draining", "drained", "lost"]
    assert log.recovered == ()


def schedule(draw: random.Random) -> list[Event]:
    """Faults over the first 20 s; all is whole again after 30 s."""
    events: list[Event] = []
    for node in draw.sample(sorted(PLACEMENT), draw.randint(1, 3)):
        at_s = round(draw.uniform(0.1, 20.0), 2)
        back_s = at_s + draw.choice([0.5, 1.5, 10.0])
        kind = draw.choice(["kill", "freeze", "slow"])
        if kind == "kill":
            events += [NodeDies(at_s=at_s, node=node), NodeJoins(at_s=back_s, node=node)]
        elif kind == "freeze":
            events += [NodeFreezes(at_s=at_s, node=node), NodeResumes(at_s=back_s, node=node)]
        else:
            events += [NodeSlows(at_s=at_s, node=node, factor=draw.choice([1.5, 4.0]))]
    src, dst = draw.choice([("a", "d"), ("b", "c"), ("b", "a"), ("a", "c")])
    cut_s = round(draw.uniform(0.1, 20.0), 2)
    events += [LinkCut(at_s=cut_s, src=src, dst=dst), LinkHeals(at_s=cut_s + draw.choice([1.0, 8.0]), src=src, dst=dst)]
    return sorted(events, key=lambda event: event.at_s)


@pytest.mark.parametrize("seed", range(25))
def test_every_request_ends_whatever_happens(seed: int) -> None:
    events = schedule(random.Random(seed))
    config = SimulationConfig(
        workload=MIXED, arrivals=OFFLINE, num_requests=300, duration_s=None, warmup_s=0.0, seed=seed
    )
    first = run(config, *events)

    assert len(first.requests) == 300
    assert first.cut_short == ""
    assert msgspec.json.encode(run(config, *events)) == msgspec.json.encode(first), "a seed gives the same run"
