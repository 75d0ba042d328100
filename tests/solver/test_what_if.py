"""What if: what a plan for another cluster moves, at least, and what it gains."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import solver.cli
from profiler.cluster_profile import ClusterProfile, DefaultLink, Link, ModelFacts
from profiler.records import load_record, save_record
from solver import Plan, problems_of
from solver.capacity import Capacities
from solver.plan import LayerRange
from solver.request import PlanRequest, answer_what_if
from solver.whatif import bytes_to_load, difference_lines, with_fewest_bytes_moved, with_nodes, without_nodes

from .clusters import WORKLOAD, model, table_node

SIZED = model(12, embedding_bytes=5e5, head_bytes=7e5)


def alike(count: int, model_facts: ModelFacts = SIZED, links: tuple[Link, ...] = ()) -> ClusterProfile:
    nodes = tuple(table_node(f"n{i}", [90.0, 50.0, 40.0, 30.0]) for i in range(count))
    return ClusterProfile(model=model_facts, nodes=nodes, links=links, default_link=DefaultLink(1e9))


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
    request = PlanRequest(profile=with_nodes(profile, ["4xn0"]), workload=WORKLOAD, objective="max-flow")
    before, after = answer_what_if(request, profile)
    assert isinstance(before, Plan)
    assert isinstance(after, Plan)
    assert not list(problems_of(request.profile, after))
    # Twice the nodes: the same chain again, or one with half as many layers each; the four there stay in part at least.
    lines = list(difference_lines(request.profile, before, after))
    assert after.predicted.max_flow_tokens_per_s >= before.predicted.max_flow_tokens_per_s
    there = {name: held for name, held in after.placement.items() if name in before.placement}
    lacking = sum(bytes_to_load(profile.model, before.placement[name], held) for name, held in there.items())
    assert lacking <= 2 * 1e6 * len(there)
    assert any("GB to load in all" in line for line in lines)


def test_swapped_nodes_whose_links_differ_keep_the_plan_with_the_larger_flow() -> None:
    """n2 is alike but for its slow link; swapping it in would move less, and carry less."""
    slow = tuple(Link(src=a, dst=b, bandwidth_bytes_per_s=1e4) for a, b in (("n0", "n2"), ("n2", "n1")))
    profile = alike(4, model(8), slow)
    request = PlanRequest(profile=without_nodes(profile, ["n3"]), workload=WORKLOAD, objective="max-flow")
    before, after = answer_what_if(request, profile)
    assert isinstance(before, Plan)
    assert isinstance(after, Plan)
    assert not list(problems_of(request.profile, after))
    alone = answer_what_if(request, request.profile)[1]
    assert isinstance(alone, Plan)
    assert after.predicted.max_flow_tokens_per_s == pytest.approx(alone.predicted.max_flow_tokens_per_s)


def test_what_ifs_by_command_say_what_moves_and_what_is_gained(tmp_path: Path) -> None:
    cluster, plan = tmp_path / "c.json", tmp_path / "p.json"
    save_record(cluster, alike(4))
    app = typer.Typer()
    solver.cli.mount(app)
    options = ["--objective", "max-flow", "--one-more-s", "0", "-o", str(plan)]
    result = CliRunner().invoke(app, ["solve", str(cluster), "--remove", "n2", *options])
    assert result.exit_code == 0, result.output
    said = result.stdout.split("against the cluster as it is:\n")[1]
    assert "n2" in said
    assert "-> unused" in said
    assert "GB to load in all" in said
    assert "max-flow: 40.0 -> 30.0 tokens/s, -10.0 (-25.0%)" in said
    assert "n2" not in load_record(plan, Plan).placement
    result = CliRunner().invoke(app, ["solve", str(cluster), "--exclude", "n2", *options])
    assert "against the cluster" not in result.stdout
