"""A capacity table is read as iterations of a usual batch: fewer or shorter requests are never slower per token."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helixbench.profiler.cost.model import BatchShape
from helixbench.solver.expected.analytic import predict_analytically
from helixbench.solver.expected.simulated import Effort, simulated
from helixbench.solver.flow.max_flow import max_flow
from helixbench.solver.placement.baselines import METHODS
from helixbench.solver.problem.capacity import Capacities
from helixbench.solver.problem.plan import Placement
from helixbench.solver.problem.tables import USUAL_TOKENS, table_cost
from helixbench.solver.problem.workload import Workload, fixed_workload
from helixbench.solver.questions.generate import make_cluster

TABLES = st.lists(st.floats(1.0, 1e5), min_size=1, max_size=12)


def seconds(table: list[float], layers: int, tokens: float) -> float:
    cost = table_cost(table, layers)
    return cost.time_s(num_layers=layers, batch=BatchShape(decode_tokens=tokens), first=False, last=False)


@given(table=TABLES, layers=st.integers(1, 12))
def test_the_usual_batch_carries_what_the_table_says_and_smaller_ones_less(table: list[float], layers: int) -> None:
    layers = min(layers, len(table))
    most = int(table_cost(table, layers).max_tokens)
    rates = [tokens / seconds(table, layers, tokens) for tokens in sorted({1, (most + 1) // 2, most})]
    assert all(before <= after * (1 + 1e-12) for before, after in itertools.pairwise(rates))
    assert rates[-1] == pytest.approx(table[layers - 1])


@given(table=TABLES, layers=st.integers(1, 12), fewer=st.floats(1.0, 60.0), more=st.floats(0.0, 60.0))
def test_fewer_tokens_never_take_longer(table: list[float], layers: int, fewer: float, more: float) -> None:
    layers = min(layers, len(table))
    assert seconds(table, layers, fewer) <= seconds(table, layers, fewer + more) * (1 + 1e-12)


def test_a_table_that_falls_as_one_over_the_layers_keeps_its_batch() -> None:
    table = [1200.0 / layers for layers in range(1, 7)]
    assert {table_cost(table, layers).max_tokens for layers in range(1, 7)} == {USUAL_TOKENS}
    assert table_cost(table, 6).step_s == pytest.approx(6 * table_cost(table, 1).step_s)


def cluster(seed: int) -> tuple[Capacities, Placement]:
    profile = make_cluster(num_nodes=6, num_types=2, num_regions=1, num_layers=24, seed=seed)
    capacities = Capacities(profile, fixed_workload(prompt_tokens=64, output_tokens=32))
    placement = METHODS["petals"](capacities) or METHODS["swarm"](capacities)
    assert placement is not None
    return capacities, placement


def estimated_token_s(capacities: Capacities, placement: Placement, workload: Workload, concurrency: int) -> float:
    """Seconds for each prompt and output token of a request, by the analytical estimate."""
    of = Capacities(capacities.profile, workload, concurrency=concurrency)
    flow = max_flow(of, placement, spread=True)
    found = predict_analytically(of, flow.used(placement), flow.links, concurrency)
    return (found.in_flight or 1.0) / found.total_tokens_per_s


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 5),
    prompt=st.integers(4, 100),
    output=st.integers(2, 60),
    longer=st.integers(1, 8),
    concurrency=st.integers(1, 64),
    fewer=st.floats(0.1, 1.0),
)
def test_fewer_or_shorter_requests_are_never_slower_per_token(
    seed: int, prompt: int, output: int, longer: int, concurrency: int, fewer: float
) -> None:
    """Shorter in prompt and output alike: another mix of both is another question."""
    capacities, placement = cluster(seed)
    short = fixed_workload(prompt_tokens=prompt, output_tokens=output)
    long = fixed_workload(prompt_tokens=prompt * longer, output_tokens=output * longer)
    base = estimated_token_s(capacities, placement, long, concurrency)
    assert estimated_token_s(capacities, placement, short, concurrency) <= base * 1.02
    assert estimated_token_s(capacities, placement, long, max(1, int(concurrency * fewer))) <= base * (1 + 1e-9)


def test_one_short_request_is_no_slower_than_many_long_ones_when_simulated() -> None:
    capacities, placement = cluster(1)
    round_s = []
    for prompt, output, concurrency in ((64, 8, 1), (64, 32, 4), (512, 128, 32)):
        of = Capacities(
            capacities.profile,
            fixed_workload(prompt_tokens=prompt, output_tokens=output),
            concurrency=concurrency,
        )
        flow = max_flow(of, placement, spread=True)
        found = simulated(of, flow.used(placement), flow, concurrency, effort=Effort(max_work=300_000))
        assert found is not None
        round_s.append(found.expected.tpot_s or 0.0)
    assert round_s == sorted(round_s)
    assert round_s[0] < 1.0
