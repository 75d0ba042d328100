"""Questions beside the plain one: pins, added and excluded nodes, targets, infeasibility in words."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from helixbench.errors import InputError
from helixbench.profiler.cluster import ClusterProfile, DefaultLink
from helixbench.records import load_record, save_record
from helixbench.solver import Infeasible, Plan, SolveConfig, cli, problems_of, solve_placement
from helixbench.solver.problem.plan import LayerRange
from helixbench.solver.questions.answer import answer
from helixbench.solver.questions.what_if import parse_pins, with_nodes, without_nodes
from tests.solver.clusters import WORKLOAD, cost_node, model, table_node


@pytest.fixture
def four() -> ClusterProfile:
    nodes = tuple(table_node(name, [100.0, 60.0, 40.0]) for name in ("a", "b", "c", "d"))
    return ClusterProfile(model=model(6), nodes=nodes, default_link=DefaultLink(1e9))


def solved(profile: ClusterProfile, **options: object) -> Plan:
    answer = solve_placement(
        SolveConfig(cluster=profile, workload=WORKLOAD, objective="max-flow", concurrency=4, **options)
    )  # type: ignore[arg-type]
    assert isinstance(answer, Plan), answer
    assert not list(problems_of(profile, answer))
    return answer


def test_a_pinned_node_holds_its_range(four: ClusterProfile) -> None:
    free, pinned = solved(four), solved(four, pins={"a": LayerRange(1, 4)})
    assert pinned.placement.get("a", LayerRange(1, 4)) == LayerRange(1, 4)
    assert pinned.predicted.max_flow_tokens_per_s <= free.predicted.max_flow_tokens_per_s
    assert pinned.predicted.gap <= 1e-6


@pytest.mark.parametrize(
    ("pin", "said"),
    [("x=[0,2)", "no node 'x'"), ("a=[0,5)", "at most 3"), ("a=[4,7)", "6 layers"), ("a", "need NODE")],
)
def test_a_pin_that_no_plan_keeps_is_refused(four: ClusterProfile, tmp_path: Path, pin: str, said: str) -> None:
    save_record(tmp_path / "c.json", four)
    result = _run("solve", str(tmp_path / "c.json"), "--pin", pin, "-o", str(tmp_path / "p.json"))
    assert isinstance(result.exception, InputError)
    assert said in str(result.exception)


@pytest.mark.parametrize("text", ["n=[2,5)", "n=2-5", "n=2,5"])
def test_pins_are_read_in_three_ways(text: str) -> None:
    assert parse_pins([text]) == {"n": LayerRange(2, 5)}


def test_added_nodes_are_like_those_there_are(four: ClusterProfile) -> None:
    more = with_nodes(four, ["2xgpu3"])
    assert len(more.nodes) == 6
    assert len({node.name for node in more.nodes}) == 6
    assert solved(more).predicted.max_flow_tokens_per_s >= solved(four).predicted.max_flow_tokens_per_s
    with pytest.raises(InputError, match="NUMBERxDEVICE"):
        with_nodes(four, ["2xH100"])


def test_left_out_nodes_are_not_used(four: ClusterProfile) -> None:
    fewer = without_nodes(four, ["a", "b"])
    assert set(solved(fewer).placement) == {"c", "d"}
    with pytest.raises(InputError, match="no node 'x'"):
        without_nodes(four, ["x"])


def test_infeasible_names_what_every_node_holds(four: ClusterProfile) -> None:
    answer = solve_placement(SolveConfig(cluster=without_nodes(four, ["a", "b", "c"]), workload=WORKLOAD))
    assert isinstance(answer, Infeasible)
    assert answer.reason == "the model needs 6 layers; all nodes together hold 3: d 3"


def test_pins_are_what_too_few_layers_are_put_down_to(four: ClusterProfile) -> None:
    pins = {"a": LayerRange(0, 1), "b": LayerRange(0, 1), "c": LayerRange(0, 1)}
    answer = solve_placement(SolveConfig(cluster=without_nodes(four, ["d"]), workload=WORKLOAD, pins=pins))
    assert isinstance(answer, Infeasible)
    assert "all nodes together hold 3: a 1, b 1, c 1 (pinned: a=[0,1), b=[0,1), c=[0,1);" in answer.reason
    assert "KV cache" not in answer.reason


@pytest.mark.parametrize("target", [{"max_tpot_s": 0.5}, {"max_ttft_s": 0.5}, {"min_tokens_per_s": 5.0}])
def test_a_target_does_not_hide_that_the_model_does_not_fit(target: dict[str, float]) -> None:
    profile = ClusterProfile(model=model(6), nodes=(cost_node("a", max_layers=3),), default_link=DefaultLink(1e9))
    found = answer(SolveConfig(cluster=profile, workload=WORKLOAD, **target))  # type: ignore[arg-type]
    assert found.plan == Infeasible(reason="the model needs 6 layers; all nodes together hold 3: a 3")


def refused_without_search(monkeypatch: pytest.MonkeyPatch, profile: ClusterProfile, **options: object) -> str:
    """Why there is no plan, as told before any search."""
    searches: list[object] = []
    monkeypatch.setattr("helixbench.solver.questions.solve.run_search", lambda *search: searches.append(search))
    found = solve_placement(SolveConfig(cluster=profile, workload=WORKLOAD, **options))  # type: ignore[arg-type]
    assert isinstance(found, Infeasible)
    assert not searches
    return found.reason


def test_layers_that_pins_leave_to_no_node_are_named(four: ClusterProfile, monkeypatch: pytest.MonkeyPatch) -> None:
    pins = {name: LayerRange(1, 3) for name in ("a", "b", "c", "d")} | {"d": LayerRange(4, 5)}
    reason = refused_without_search(monkeypatch, four, pins=pins)
    assert reason.startswith("no node can hold layers [0,1), [3,4), [5,6) of 6 (pinned: a=[1,3), ")


@pytest.mark.parametrize(
    ("part", "layers", "sizes"),
    [("embedding", "[0,1)", {"embedding_bytes": 2e9}), ("head", "[5,6)", {"head_bytes": 2e9})],
)
def test_an_embedding_or_head_that_fits_no_node_is_named(
    monkeypatch: pytest.MonkeyPatch, part: str, layers: str, sizes: dict[str, float]
) -> None:
    nodes = tuple(cost_node(name, max_layers=6, memory_bytes=1e9) for name in ("a", "b"))
    profile = ClusterProfile(model=model(6, **sizes), nodes=nodes, default_link=DefaultLink(1e9))
    reason = refused_without_search(monkeypatch, profile)
    assert reason == (
        f"no node can hold layers {layers} of 6 together with the {part} of 2e+09 bytes and "
        "the KV cache of the longest request, 150 tokens"
    )


def test_a_pin_that_the_plan_does_not_use_is_noted(four: ClusterProfile) -> None:
    config = SolveConfig(
        cluster=four, workload=WORKLOAD, min_tokens_per_s=20.0, time_limit_s=2, pins={"d": LayerRange(0, 3)}
    )
    plan = answer(config).plan
    assert isinstance(plan, Plan)
    assert "d" not in plan.placement
    assert "pinned, but the plan does not use it: d=[0,3)" in plan.assumptions.notes
    pins = {"d": LayerRange(0, 3)}
    used = answer(SolveConfig(cluster=four, workload=WORKLOAD, objective="max-flow", pins=pins)).plan
    assert isinstance(used, Plan)
    assert "d" in used.placement
    assert not any("pinned" in note for note in used.assumptions.notes)


def test_a_table_without_memory_for_any_layer_is_refused() -> None:
    """24 for 24 GB; either node holds the whole model, so both would be used."""
    nodes = tuple(table_node(name, [9.0, 5.0], memory_bytes=size) for name, size in (("a", 24e9), ("b", 24.0)))
    profile = ClusterProfile(model=model(2), nodes=nodes, default_link=DefaultLink(1e9))
    with pytest.raises(InputError, match=r"node b: device\.memory_bytes 24, .*one layer of 1e\+06 bytes.*--exclude b"):
        solve_placement(SolveConfig(cluster=profile, workload=WORKLOAD, objective="max-flow", concurrency=4))


def _run(*arguments: str):  # type: ignore[no-untyped-def]
    app = typer.Typer()
    cli.mount(app)
    app.add_typer(cli.cluster_commands(), name="cluster")
    return CliRunner().invoke(app, list(arguments))


def test_targets_by_command(tmp_path: Path) -> None:
    cluster, plan = tmp_path / "c.json", tmp_path / "p.json"
    whole = (cost_node("one", max_layers=6), cost_node("two", max_layers=6))
    nodes = (*whole, cost_node("small", speed=0.3, max_layers=3))
    save_record(cluster, ClusterProfile(model=model(6), nodes=nodes, default_link=DefaultLink(1e8, 1e-4)))
    common = ["solve", str(cluster), "--concurrency", "16", "--time-limit-s", "1", "-o", str(plan)]
    common += ["--prompt-tokens", "64", "--output-tokens", "32"]
    result = _run(*common)
    assert result.exit_code == 0, result.output
    assert len(load_record(plan, Plan).placement) == 2
    limit = (load_record(plan, Plan).predicted.expected[0].tpot_s or 0.0) * 1.2
    assert _run(*common, "--max-tpot-s", str(limit)).exit_code == 0
    assert (load_record(plan, Plan).predicted.expected[-1].tpot_s or 0.0) <= limit
    assert _run(*common, "--max-tpot-s", "1e-6").exit_code == 1
    result = _run(*common, "--min-tokens-per-s", "100")
    assert result.exit_code == 0, result.output
    assert len(load_record(plan, Plan).placement) == 1
    assert _run(*common, "--min-tokens-per-s", "1e9").exit_code == 1


def test_clusters_from_a_seed_are_the_same_again(tmp_path: Path) -> None:
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path in paths:
        options = ["--nodes", "12", "--types", "3", "--regions", "2", "--seed", "5"]
        assert _run("cluster", "make", *options, "-o", str(path)).exit_code == 0
    one, two = (load_record(path, ClusterProfile) for path in paths)
    assert (one.nodes, one.links) == (two.nodes, two.links)
    assert {node.region for node in one.nodes} == {"region-0", "region-1"}
