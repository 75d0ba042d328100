"""Gates inside a project's own tests: a pytest plugin, loaded by its entry point wherever helixbench is installed.

Fixtures ``cluster_profile``, ``plan``, ``pipeline`` and ``stage_benchmark``; markers
``max_flow(min_ratio, max_ratio)`` and ``gate(max_median_s)``. A gate whose test measured nothing fails.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from helixbench.errors import HelixbenchError
from helixbench.profiler.cluster import ClusterProfile
from helixbench.records import load_record, save_record
from helixbench.reports.served_plan import Load, ServedPlan, serve_plan
from helixbench.solver.problem.plan import Plan

CPU = "cpu"
ROUNDS, WARMUP_ROUNDS = 20, 3


class GateLine(msgspec.Struct, frozen=True, kw_only=True):
    """One gate of one test."""

    test: str
    gate: str
    is_passed: bool
    message: str


class SessionRecord(msgspec.Struct, frozen=True, kw_only=True, tag_field="schema", tag="helixbench.pytest/1"):
    """What ``--helixbench-json`` writes."""

    gates: tuple[GateLine, ...]
    loads: tuple[Load, ...]


_GATES = pytest.StashKey[list[GateLine]]()
_LOADS = pytest.StashKey[list[Load]]()
_BENCHMARK = pytest.StashKey[Any]()  # the fixture of pytest-benchmark that a test used
_RECORDS = pytest.StashKey[dict[str, Any]]()  # what was loaded, for the terminal section


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options."""
    group = parser.getgroup("helixbench")
    group.addoption("--cluster-profile", type=Path, metavar="FILE", help="cluster.json for the fixture cluster_profile")
    group.addoption("--plan", type=Path, metavar="FILE", help="plan.json for the fixtures plan and pipeline")
    group.addoption("--helixbench-model", metavar="M", help="model that the fixture pipeline serves")
    group.addoption("--helixbench-testbed", type=Path, metavar="FILE", help="testbed that it is served on")
    group.addoption("--helixbench-json", type=Path, metavar="FILE", help="write every gate and every load as JSON")


def pytest_configure(config: pytest.Config) -> None:
    """Markers, and what the session collects."""
    config.addinivalue_line(
        "markers", "max_flow(min_ratio=0, max_ratio=1.05): hold what `pipeline.load` measured against the max-flow"
    )
    config.addinivalue_line("markers", "gate(max_median_s): hold the median that `stage_benchmark` measured")
    config.stash[_GATES], config.stash[_LOADS], config.stash[_RECORDS] = [], [], {}


@pytest.fixture(scope="session")
def cluster_profile(pytestconfig: pytest.Config) -> ClusterProfile:
    """The profile of ``--cluster-profile``."""
    found: ClusterProfile = _record(pytestconfig, "--cluster-profile", ClusterProfile)
    return found


@pytest.fixture(scope="session")
def plan(pytestconfig: pytest.Config) -> Plan:
    """The plan of ``--plan``."""
    found: Plan = _record(pytestconfig, "--plan", Plan)
    return found


@pytest.fixture(scope="session")
def pipeline(pytestconfig: pytest.Config, plan: Plan) -> Iterator[ServedPlan]:
    """The plan of ``--plan``, served once for the whole session."""
    model = pytestconfig.getoption("--helixbench-model")
    if model is None:
        pytest.skip("no model to serve: pytest --helixbench-model M")
    testbed = pytestconfig.getoption("--helixbench-testbed")
    with serve_plan(pytestconfig.getoption("--plan"), plan, model=model, testbed=testbed) as served:
        yield served


@pytest.fixture
def stage_benchmark(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """``stage_benchmark(function, *args, device="cuda:0")``: pytest-benchmark's statistics over time on the device.

    On ``device="cpu"`` the time is the wall clock's. Returns what the function returned.
    """

    def measure(
        function: Callable[..., Any],
        *args: Any,
        device: str = CPU,
        rounds: int = ROUNDS,
        warmup_rounds: int = WARMUP_ROUNDS,
    ) -> Any:
        if device != CPU:
            from helixbench.reports.stage_timing import device_timer

            request.node.add_marker(pytest.mark.benchmark(timer=device_timer(device)))
        benchmark = request.getfixturevalue("benchmark")
        request.node.stash[_BENCHMARK] = benchmark
        benchmark.extra_info["device"] = device
        return benchmark.pedantic(function, args=args, rounds=rounds, warmup_rounds=warmup_rounds)

    return measure


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    """After a test has passed, hold its gates."""
    served = pyfuncitem.funcargs.get("pipeline")
    before = len(served.loads) if isinstance(served, ServedPlan) else 0
    result = yield
    loads = served.loads[before:] if isinstance(served, ServedPlan) else []
    pyfuncitem.config.stash[_LOADS].extend(loads)
    lines = [
        *(line for mark in pyfuncitem.iter_markers("max_flow") for line in _max_flow_lines(pyfuncitem, mark, loads)),
        *(_median_line(pyfuncitem, mark) for mark in pyfuncitem.iter_markers("gate")),
    ]
    pyfuncitem.config.stash[_GATES].extend(lines)
    failed = [line.message for line in lines if not line.is_passed]
    if failed:
        pytest.fail("; ".join(failed), pytrace=False)
    return result


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """The plan or the cluster as the terminal shows it, and every gate; nothing where nothing was asked for."""
    gates, records = config.stash[_GATES], config.stash[_RECORDS]
    if not gates and not records:
        return
    terminalreporter.section("helixbench")
    for text in _summaries(records):
        terminalreporter.write_line(text)
    for line in gates:
        terminalreporter.write_line(f"{'PASS' if line.is_passed else 'FAIL'}  {line.test}  {line.message}")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write ``--helixbench-json``."""
    path = session.config.getoption("--helixbench-json")
    if path is not None:
        gates, loads = session.config.stash[_GATES], session.config.stash[_LOADS]
        save_record(path, SessionRecord(gates=tuple(gates), loads=tuple(loads)))


def _record(config: pytest.Config, option: str, kind: Any) -> Any:
    path = config.getoption(option)
    if path is None:
        pytest.skip(f"no file for it: pytest {option} FILE")
    try:
        record = load_record(path, kind)
    except HelixbenchError as error:
        pytest.fail(str(error), pytrace=False)
    config.stash[_RECORDS][option] = record
    return record


def _summaries(records: dict[str, Any]) -> Iterator[str]:
    from rich.console import Console

    from helixbench.reports.render.terminal import plan_summary, profile_summary

    console = Console(width=80, highlight=False, no_color=True, force_terminal=False)
    profile, plan = records.get("--cluster-profile"), records.get("--plan")
    with console.capture() as captured:
        if plan is not None:
            console.print(plan_summary(plan, profile))
        elif profile is not None:
            console.print(profile_summary(profile))
    yield from captured.get().rstrip().splitlines()


def _max_flow_lines(item: pytest.Function, mark: pytest.Mark, loads: list[Load]) -> list[GateLine]:
    low, high = float(mark.kwargs.get("min_ratio", 0.0)), float(mark.kwargs.get("max_ratio", 1.05))
    if not loads:
        message = "max_flow: the test measured nothing; call pipeline.load(...)"
        return [GateLine(test=item.nodeid, gate="max_flow", is_passed=False, message=message)]
    return [
        GateLine(
            test=item.nodeid,
            gate="max_flow",
            is_passed=low <= load.ratio_to_max_flow <= high,
            message=f"max_flow: {load.total_tokens_per_s:.4g} tokens/s at concurrency {load.concurrency} = "
            f"{load.ratio_to_max_flow:.3f} x max-flow; asked for {low:g} .. {high:g}",
        )
        for load in loads
    ]


def _median_line(item: pytest.Function, mark: pytest.Mark) -> GateLine:
    limit_s = float(mark.kwargs["max_median_s"])
    median_s = _median_of(item)
    if median_s is None:
        message = "gate: the test measured nothing; call stage_benchmark(...), and leave out --benchmark-disable"
        return GateLine(test=item.nodeid, gate="gate", is_passed=False, message=message)
    return GateLine(
        test=item.nodeid,
        gate="gate",
        is_passed=median_s <= limit_s,
        message=f"gate: median {median_s:.4g} s; at most {limit_s:g} s",
    )


def _median_of(item: pytest.Function) -> float | None:
    """The median of the test's own benchmark, wherever in the test it was asked for."""
    benchmark: Any = item.stash.get(_BENCHMARK, item.funcargs.get("benchmark"))
    if benchmark is None or benchmark.stats is None:
        return None
    return float(benchmark.stats.stats.median)
