"""Gates of a cluster, a plan, a served plan and a stage, to copy into your own tests.

With helixbench installed, name the files; a test whose file is missing is skipped with a reason::

    pytest --cluster-profile cluster.json --plan plan.json --helixbench-model MODEL
"""

import pytest


def test_every_node_was_profiled_well(cluster_profile):
    """Samples kept out of the fit are missed by a tenth at most."""
    for node in cluster_profile.nodes:
        if node.cost is not None:
            assert node.cost.held_out_error_median <= 0.10, node.name


def test_the_plan_is_close_to_what_is_provably_possible(plan):
    """No other plan could carry a tenth more."""
    assert plan.predicted.gap <= 0.10


@pytest.mark.max_flow(min_ratio=0.5, max_ratio=1.05)
def test_the_served_plan_reaches_its_flow(pipeline):
    """Half of the bound at least, over HTTP, and never more than the bound."""
    pipeline.load(concurrency=8, num_requests=16, prompt_tokens=32, output_tokens=8)


@pytest.mark.gate(max_median_s=0.5)
def test_a_product_is_fast(stage_benchmark):
    """Time on the device where there is one."""
    torch = pytest.importorskip("torch")
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    matrix = torch.randn(128, 128, device=device)

    stage_benchmark(torch.matmul, matrix, matrix, device=device)
