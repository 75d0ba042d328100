"""Gates of a cluster, a plan, a served plan and a stage, to copy into your own tests.

pytest loads the plugin wherever helixbench is installed. Name the files; a test whose file is missing is skipped::

    pytest --helixbench-cluster cluster.json --helixbench-plan plan.json --helixbench-model MODEL
"""

import pytest


def test_every_node_was_profiled_well(helixbench_cluster):
    """The fitted stage times miss held-out samples by a tenth at most, in the median."""
    for node in helixbench_cluster.nodes:
        if node.cost is not None:
            assert node.cost.held_out_error_median <= 0.10, node.name


def test_the_plan_is_close_to_the_bound(helixbench_plan):
    """No other plan could carry more than a tenth more."""
    assert helixbench_plan.predicted.gap <= 0.10


@pytest.mark.helixbench_max_flow(min_ratio=0.5, max_ratio=1.05)
def test_the_served_plan_reaches_its_flow(helixbench_server):
    """At least half of the bound, over HTTP, and never more than the bound."""
    helixbench_server.load(concurrency=8, num_requests=16, prompt_tokens=32, output_tokens=8)


@pytest.mark.helixbench_median(max_s=0.5)
def test_a_product_is_fast(helixbench_benchmark):
    """Timed until the device has finished, where there is one."""
    torch = pytest.importorskip("torch")
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    matrix = torch.randn(128, 128, device=device)

    helixbench_benchmark(torch.matmul, matrix, matrix, device=device)
