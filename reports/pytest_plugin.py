"""Gates in a project's own tests. Pytest loads this plugin by itself wherever helixbench is installed.

Fixtures ``helixbench_cluster``, ``helixbench_plan``, ``helixbench_server`` and ``helixbench_benchmark``; markers
``helixbench_max_flow(min_ratio, max_ratio)`` and ``helixbench_median(max_s)``. A gate whose test measured nothing
fails. Every name carries the prefix and nothing is imported before it is used, because the plugin is part of every
test run of an environment.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import pytest

if TYPE_CHECKING:
    import msgspec

    from helixbench.profiler.cluster import ClusterProfile
    from helixbench.reports.served_plan import Load, ServedPlan
    from helixbench.solver.problem.plan import Plan

RecordT = TypeVar("RecordT", bound="msgspec.Struct")
CPU = "cpu"
ROUNDS, WARMUP_ROUNDS = 20, 3
CLUSTER, PLAN, JSON = "--helixbench-cluster", "--helixbench-plan", "--helixbench-json"
MODEL, TESTBED = "--helixbench-model", "--helixbench-testbed"


class GateLine(NamedTuple):
    """The result of one gate of one test."""

    test: str
    gate: str
    is_passed: bool
    message: str


_GATES = pytest.StashKey[list[GateLine]]()
_LOADS = pytest.StashKey[list["Load"]]()
_BENCHMARK = pytest.StashKey[Any]()  # pytest-benchmark's fixture that a test used


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options."""
    group = parser.getgroup("helixbench")
    group.addoption(CLUSTER, type=Path, metavar="FILE", help="cluster.json for the fixture helixbench_cluster")
    group.addoption(PLAN, type=Path, metavar="FILE", help="plan.json for helixbench_plan and helixbench_server")
    group.addoption(MODEL, metavar="M", help="model that helixbench_server serves")
    group.addoption(TESTBED, type=Path, metavar="FILE", help="testbed that helixbench_server runs on")
    group.addoption(JSON, type=Path, metavar="FILE", help="write every gate and every load as JSON")


def pytest_configure(config: pytest.Config) -> None:
    """Register the markers."""
    config.addinivalue_line(
        "markers",
        "helixbench_max_flow(min_ratio=0, max_ratio=1.05): gate the loads of helixbench_server on the plan's max-flow",
    )
    config.addinivalue_line("markers", "helixbench_median(max_s): gate the median of helixbench_benchmark")
    config.stash[_GATES], config.stash[_LOADS] = [], []


@pytest.fixture(scope="session")
def helixbench_cluster(pytestconfig: pytest.Config) -> ClusterProfile:
    """The profile of ``--helixbench-cluster``."""
    from helixbench.profiler.cluster import ClusterProfile

    return _record(pytestconfig, CLUSTER, ClusterProfile)


@pytest.fixture(scope="session")
def helixbench_plan(pytestconfig: pytest.Config) -> Plan:
    """The plan of ``--helixbench-plan``."""
    from helixbench.solver.problem.plan import Plan

    return _record(pytestconfig, PLAN, Plan)


@pytest.fixture(scope="session")
def helixbench_server(pytestconfig: pytest.Config, helixbench_plan: Plan) -> Iterator[ServedPlan]:  # noqa: ARG001
    """The plan of ``--helixbench-plan``, served once for the whole session."""
    model = pytestconfig.getoption(MODEL)
    if model is None:
        pytest.skip(f"no model to serve: add {MODEL} M")
    from helixbench.reports.served_plan import serve_plan

    with serve_plan(pytestconfig.getoption(PLAN), model=model, testbed=pytestconfig.getoption(TESTBED)) as served:
        yield served


@pytest.fixture
def helixbench_benchmark(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """``helixbench_benchmark(function, *args, device="cuda:0")``: pytest-benchmark's statistics of a stage.

    On a CUDA device a round ends when the device has finished, not when the work is queued. Returns the function's
    result.
    """

    def measure(
        function: Callable[..., Any],
        *args: Any,
        device: str = CPU,
        rounds: int = ROUNDS,
        warmup_rounds: int = WARMUP_ROUNDS,
    ) -> Any:
        benchmark = request.getfixturevalue("benchmark")
        request.node.stash[_BENCHMARK] = benchmark
        benchmark.extra_info["device"] = device
        timed = function if device == CPU else _until_finished(function, device)
        return benchmark.pedantic(timed, args=args, rounds=rounds, warmup_rounds=warmup_rounds)

    return measure


def _until_finished(function: Callable[..., Any], device: str) -> Callable[..., Any]:
    import torch

    def finished(*args: Any) -> Any:
        result = function(*args)
        torch.cuda.synchronize(device)
        return result

    torch.cuda.synchronize(device)  # earlier work is not part of the first round
    return finished


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    """Evaluate the gates of a test that has passed."""
    served: Any = pyfuncitem.funcargs.get("helixbench_server")
    before = len(served.loads) if served is not None else 0
    result = yield
    loads = served.loads[before:] if served is not None else []
    pyfuncitem.config.stash[_LOADS].extend(loads)
    lines = [
        line for mark in pyfuncitem.iter_markers("helixbench_max_flow") for line in _flow_lines(pyfuncitem, mark, loads)
    ]
    lines += [_median_line(pyfuncitem, mark) for mark in pyfuncitem.iter_markers("helixbench_median")]
    pyfuncitem.config.stash[_GATES].extend(lines)
    failed = [line.message for line in lines if not line.is_passed]
    if failed:
        pytest.fail("; ".join(failed), pytrace=False)
    return result


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """List every gate; nothing in a session without gates."""
    if config.stash[_GATES]:
        terminalreporter.section("helixbench")
    for line in config.stash[_GATES]:
        terminalreporter.write_line(f"{'PASS' if line.is_passed else 'FAIL'}  {line.test}  {line.message}")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write ``--helixbench-json``."""
    path = session.config.getoption(JSON)
    if path is not None:
        import msgspec

        from helixbench.records import save_bytes

        gates, loads = session.config.stash[_GATES], session.config.stash[_LOADS]
        record = {"schema": "helixbench.pytest/1", "gates": [gate._asdict() for gate in gates], "loads": loads}
        save_bytes(path, msgspec.json.format(msgspec.json.encode(record), indent=1))


def _record(config: pytest.Config, option: str, kind: type[RecordT]) -> RecordT:
    path = config.getoption(option)
    if path is None:
        pytest.skip(f"no file: add {option} FILE")
    from helixbench.errors import HelixbenchError
    from helixbench.records import load_record

    try:
        return load_record(path, kind)
    except HelixbenchError as error:
        pytest.fail(str(error), pytrace=False)


def _flow_lines(item: pytest.Function, mark: pytest.Mark, loads: Sequence[Load]) -> list[GateLine]:
    low, high = float(mark.kwargs.get("min_ratio", 0.0)), float(mark.kwargs.get("max_ratio", 1.05))
    if not loads:
        message = "max_flow: the test measured nothing; call helixbench_server.load(...)"
        return [GateLine(item.nodeid, "max_flow", False, message)]
    return [
        GateLine(
            item.nodeid,
            "max_flow",
            low <= load.ratio_to_max_flow <= high,
            f"max_flow: {load.total_tokens_per_s:.4g} tokens/s at concurrency {load.concurrency} = "
            f"{load.ratio_to_max_flow:.3f} x max-flow; accepted {low:g} .. {high:g}",
        )
        for load in loads
    ]


def _median_line(item: pytest.Function, mark: pytest.Mark) -> GateLine:
    limit_s = float(mark.kwargs["max_s"])
    benchmark: Any = item.stash.get(_BENCHMARK, item.funcargs.get("benchmark"))
    if benchmark is None or benchmark.stats is None:
        message = "median: the test measured nothing; call helixbench_benchmark(...) without --benchmark-disable"
        return GateLine(item.nodeid, "median", False, message)
    median_s = float(benchmark.stats.stats.median)
    message = f"median: {median_s:.4g} s; accepted up to {limit_s:g} s"
    return GateLine(item.nodeid, "median", median_s <= limit_s, message)
