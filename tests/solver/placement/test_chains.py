"""The widest chain of blocks comes close to the bound where it is alone."""

from __future__ import annotations

import pytest

from helixbench.solver.bounds.configurations import Configurations
from helixbench.solver.bounds.work import work_bound
from helixbench.solver.flow.max_flow import max_flow
from helixbench.solver.placement.chains import widest_chain
from helixbench.solver.problem.capacity import Capacities
from helixbench.solver.questions.generate import make_cluster
from tests.solver.clusters import WORKLOAD


@pytest.mark.parametrize(("nodes", "types", "seed"), [(10, 3, 0), (20, 4, 1), (30, 5, 3)])
def test_one_region_is_solved_to_within_its_bound(nodes: int, types: int, seed: int) -> None:
    profile = make_cluster(num_nodes=nodes, num_types=types, num_regions=1, seed=seed)
    capacities = Capacities(profile, WORKLOAD)
    high = work_bound(capacities)
    bound = Configurations(capacities).bound(low=0.0, high=high)
    found = widest_chain(capacities, bound=bound, seconds=20)
    assert found is not None
    carried = max_flow(capacities, found).tokens_per_s
    assert 0.95 * bound <= carried <= bound * (1 + 1e-9)
