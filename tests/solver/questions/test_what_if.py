"""What if: what a plan for another cluster moves, at least, and what it gains."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import msgspec
import pytest
import typer
from typer.testing import CliRunner

from helixbench.profiler.cluster import ClusterProfile, DefaultLink, Link, ModelFacts
from helixbench.records import load_record, save_record
from helixbench.solver import Plan, cli, problems_of
from helixbench.solver.problem.capacity import Capacities
from helixbench.solver.problem.plan import LayerRange
from helixbench.solver.questions import answer as answer_module
from helixbench.solver.questions.answer import answer
from helixbench.solver.questions.config import SolveConfig
from helixbench.solver.questions.summary import difference_lines
from helixbench.solver.questions.what_if import (
    bytes_to_load,
    with_fewest_bytes_moved,
    with_nodes,
    without_nodes,
)
from tests.solver.clusters import WORKLOAD, cost_node, model, table_node

SIZED = model(12, embedding_bytes=5e5, head_bytes=7e5)


def alike(count: int, model_facts: ModelFacts = SIZED, links: tuple[Link, ...] = ()) -> ClusterProfile:
    nodes = tuple(table_node(f"n{i}", [90.0, 50.0, 40.0, 30.0]) for i in range(count))
    return ClusterProfile(model=model_facts, nodes=nodes, links=links, default_link=DefaultLink(1e9))


def both_plans(config: SolveConfig) -> tuple[Plan, Plan]:
    """The plans for the cluster as it is, and for the changed one."""
    answered = answer(config)
    assert isinstance(answered.before, Plan)
    assert isinstance(answered.plan, Plan)
    return answered.before, answered.plan


@pytest.mark.parametrize(
    ("before", "after", "megabytes"),
    [
        (None, LayerRange(4, 6), 2.0),
        (LayerRange(4, 6), LayerRange(4, 6), 0.0),
        (LayerRange(4, 6), LayerRange(5, 8), 2.0),
        (LayerRange(4, 6), None, 0.0),
        (LayerRange(1, 3), LayerRange(0, 3), 1.5),
        (LayerRange(0, 2), LayerRange(0, 3), 1.0),
        (None, LayerRange(9, 12), 3.7),
        (LayerRange(8, 12), LayerRange(9, 12), 0.0),
    ],
)
def test_bytes_to_load_are_the_layers_embedding_and_head_that_are_not_there(
    before: LayerRange | None, after: LayerRange | None, megabytes: float
) -> None:
    assert bytes_to_load(SIZED, before, after) == pytest.approx(megabytes * 1e6)


@pytest.mark.parametrize("seed", range(10))
def test_alike_nodes_take_the_ranges_that_are_least_to_load(seed: int) -> None:
    """Against every way of giving the ranges to the nodes."""
    rng = random.Random(seed)
    profile = alike(5)
    names = [node.name for node in profile.nodes]

    def some_ranges(count: int) -> list[LayerRange]:
        return [LayerRange(start, start + rng.randint(1, 4)) for start in rng.sample(range(9), count)]

    before = dict(zip(rng.sample(names, 4), some_ranges(4), strict=True))
    after = dict(zip(rng.sample(names, 4), some_ranges(4), strict=True))
    moved = with_fewest_bytes_moved(Capacities(profile, WORKLOAD), before, after)

    def load(placement: dict[str, LayerRange]) -> float:
        return sum(bytes_to_load(profile.model, before.get(name), held) for name, held in placement.items())

    ways = (dict(zip(nodes, after.values(), strict=True)) for nodes in itertools.permutations(names, 4))
    assert sorted(moved.values()) == sorted(after.values())
    assert load(moved) == pytest.approx(min(map(load, ways)))


def test_the_same_plan_under_other_names_moves_nothing() -> None:
    before = {f"n{i}": LayerRange(3 * i, 3 * i + 3) for i in range(4)}
    renamed = {f"n{(i + 1) % 4}": held for i, held in enumerate(before.values())}
    assert with_fewest_bytes_moved(Capacities(alike(4), WORKLOAD), before, renamed) == before


def test_added_nodes_leave_the_others_where_they_are() -> None:
    profile = alike(4)
    more = with_nodes(profile, ["4xn0"])
    before, after = both_plans(SolveConfig(cluster=more, before=profile, workload=WORKLOAD, objective="max-flow"))
    assert not list(problems_of(more, after))
    # Twice the nodes: the same chain again, or one with half as many layers each; the four there stay in part at least.
    lines = list(difference_lines(more, before, after))
    assert after.predicted.max_flow_tokens_per_s >= before.predicted.max_flow_tokens_per_s
    there = {name: held for name, held in after.placement.items() if name in before.placement}
    lacking = sum(bytes_to_load(profile.model, before.placement[name], held) for name, held in there.items())
    assert lacking <= 2 * 1e6 * len(there)
    assert any("GB to load in all" in line for line in lines)


def test_swapped_nodes_whose_links_differ_keep_the_plan_with_the_larger_flow() -> None:
    """n2 is alike but for its slow link; swapping it in would move less, and carry less."""
    slow = tuple(Link(src=a, dst=b, bandwidth_bytes_per_s=1e4) for a, b in (("n0", "n2"), ("n2", "n1")))
    profile = alike(4, model(8), slow)
    fewer = without_nodes(profile, ["n3"])
    config = SolveConfig(cluster=fewer, before=profile, workload=WORKLOAD, objective="max-flow")
    _, after = both_plans(config)
    assert not list(problems_of(fewer, after))
    _, alone = both_plans(msgspec.structs.replace(config, before=fewer))
    assert after.predicted.max_flow_tokens_per_s == pytest.approx(alone.predicted.max_flow_tokens_per_s)


def both_ways(*links: tuple[str, str, float]) -> tuple[Link, ...]:
    """Links of so many bytes/s, half of it on the way back."""
    forth = (Link(src=a, dst=b, bandwidth_bytes_per_s=size) for a, b, size in links)
    back = (Link(src=b, dst=a, bandwidth_bytes_per_s=size / 2) for a, b, size in links)
    return (*forth, *back)


def linked(links: tuple[Link, ...], *, like: str = "") -> dict[tuple[str, str], float]:
    """Bandwidths among a, which is in a region with c and d, and two more like it; ``like`` is its twin."""
    nodes = [table_node(name, [90.0] if name in ("a", like) else [90.0, 50.0], region="here") for name in "acd"]
    nodes.append(table_node("far", [90.0], region="there"))
    profile = ClusterProfile(model=model(4), nodes=tuple(nodes), links=links)
    more = with_nodes(profile, ["2xa"])
    among = {"a", "a-new1", "a-new2"}
    return {(k.src, k.dst): k.bandwidth_bytes_per_s for k in more.links if {k.src, k.dst} <= among}


LINKS = both_ways(("a", "c", 3e6), ("a", "d", 2e6), ("a", "far", 9e6), ("coordinator", "a", 1e5))


@pytest.mark.parametrize(("like", "forth"), [("d", 2e6), ("", 3e6)], ids=["as with its twin", "as the fastest here"])
def test_added_nodes_are_linked_with_the_one_they_are_like_and_with_each_other(like: str, forth: float) -> None:
    pairs = itertools.combinations(["a", "a-new1", "a-new2"], 2)
    expected = {link: size for a, b in pairs for link, size in (((a, b), forth), ((b, a), forth / 2))}
    assert linked(LINKS, like=like) == expected


def test_added_nodes_far_from_all_others_are_not_linked_by_guess() -> None:
    assert linked(both_ways(("a", "far", 9e6))) == {}


def test_an_added_node_goes_on_in_a_row_with_the_one_it_is_like() -> None:
    """One node that holds half the model, linked with the coordinator and a far slower one: two of it hold it all."""
    nodes = (table_node("a", [90.0, 50.0]), table_node("b", [1.0, 1.0]))
    links = both_ways(("coordinator", "a", 1e6), ("coordinator", "b", 1e6), ("a", "b", 1e6))
    more = with_nodes(ClusterProfile(model=model(4), nodes=nodes, links=links), ["1xa"])
    plan = answer(SolveConfig(cluster=more, workload=WORKLOAD, objective="max-flow", time_limit_s=5)).plan
    assert isinstance(plan, Plan)
    assert {"a", "a-new1"} <= set(plan.placement)
    assert plan.predicted.max_flow_tokens_per_s == pytest.approx(50.0)


def test_added_nodes_leave_the_default_link_to_link_them() -> None:
    assert with_nodes(alike(2), ["3xn0"]).links == ()


def swapped_round(_: Capacities, before: dict[str, LayerRange], after: dict[str, LayerRange]) -> dict[str, LayerRange]:
    """Every range at the next node: stands in for what moves least."""
    names = list(after)
    return dict(zip((*names[1:], names[0]), after.values(), strict=True))


class TestSwapped:
    """The plan whose alike nodes are swapped is one for the same question, under the same limits."""

    @pytest.fixture(autouse=True)
    def swap(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("helixbench.solver.questions.answer.with_fewest_bytes_moved", swapped_round)

    def both(self, **options: Any) -> tuple[Plan, Plan]:
        """The plan without swapping, and the one that comes out."""
        profile = options.pop("profile", alike(4))
        config = SolveConfig(cluster=profile, workload=WORKLOAD, time_limit_s=2, **options)
        plain = answer(config).plan
        assert isinstance(plain, Plan)
        return plain, both_plans(msgspec.structs.replace(config, before=profile))[1]

    def test_keeps_the_least_nodes_of_a_target(self) -> None:
        plain, after = self.both(profile=alike(8), min_tokens_per_s=10.0)
        assert after.placement != plain.placement
        assert after.predicted.least_nodes == plain.predicted.least_nodes is not None

    def test_keeps_the_bound_of_the_requests_in_flight_asked_for(self) -> None:
        nodes = tuple(cost_node(f"n{i}", max_layers=6) for i in range(2))
        profile = ClusterProfile(model=model(12), nodes=nodes, default_link=DefaultLink(1e9))
        plain, after = self.both(profile=profile, concurrency=64, max_tpot_s=0.02)
        assert after.placement != plain.placement
        assert (after.assumptions.concurrency or 0) < 64
        assert after.predicted.bound_of_expected == plain.predicted.bound_of_expected

    @pytest.mark.parametrize("limit", ["max_tpot_s", "max_ttft_s"])
    def test_is_left_where_it_breaks_a_latency_limit(self, monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
        real = answer_module.assemble

        def slower(*arguments: Any, **options: Any) -> Plan:
            plan = real(*arguments, **options)
            worse = msgspec.structs.replace(plan.predicted.expected[-1], tpot_s=1e6, ttft_s=1e6)
            predicted = msgspec.structs.replace(plan.predicted, expected=(worse,))
            return msgspec.structs.replace(plan, predicted=predicted)

        monkeypatch.setattr("helixbench.solver.questions.answer.assemble", slower)
        plain, after = self.both(concurrency=1, **{limit: 1e5})
        assert after.placement == plain.placement

    def test_is_left_where_no_links_lead_through_it(self) -> None:
        way = [("coordinator", "n0"), ("n0", "n1"), ("n1", "n2"), ("n2", "coordinator")]
        links = tuple(Link(src=a, dst=b, bandwidth_bytes_per_s=1e6) for a, b in way)
        profile = msgspec.structs.replace(alike(3, links=links), default_link=None)
        plain, after = self.both(profile=profile, objective="max-flow")
        assert after.placement == plain.placement

    def test_goes_through_the_checker(self, monkeypatch: pytest.MonkeyPatch) -> None:
        checked: list[Plan] = []
        monkeypatch.setattr("helixbench.solver.questions.answer.require_sound", lambda _, plan: checked.append(plan))
        _, after = self.both(objective="max-flow")
        assert [plan.placement for plan in checked] == [after.placement]


def test_what_ifs_by_command_say_what_moves_and_what_is_gained(tmp_path: Path) -> None:
    cluster, plan = tmp_path / "c.json", tmp_path / "p.json"
    save_record(cluster, alike(4))
    app = typer.Typer()
    app.callback()(lambda: None)
    cli.mount(app)
    options = ["--objective", "max-flow", "-o", str(plan)]
    result = CliRunner().invoke(app, ["solve", str(cluster), "--remove", "n2", *options])
    assert result.exit_code == 0, result.output
    said = result.stdout.split("compared with the cluster as it is:\n")[1]
    assert "n2" in said
    assert "-> unused" in said
    assert "GB to load in all" in said
    assert "max-flow: 40.0 -> 30.0 tokens/s, -10.0 (-25.0%)" in said
    assert "n2" not in load_record(plan, Plan).placement
    result = CliRunner().invoke(app, ["solve", str(cluster), "--exclude", "n2", *options])
    assert "compared with the cluster" not in result.stdout
