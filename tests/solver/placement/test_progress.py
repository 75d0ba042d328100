"""Progress of a search: a live line on a terminal, plain lines elsewhere; Ctrl-C and the first plan."""

from __future__ import annotations

import os
import pty
import random
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from helixbench.records import load_record, save_record
from helixbench.solver import Plan, SolveConfig, problems_of, solve_placement
from helixbench.solver.flow.max_flow import Flow, max_flow
from helixbench.solver.placement import incumbent
from helixbench.solver.placement.baselines import METHODS
from helixbench.solver.placement.incumbent import WRITE_UP, Search
from helixbench.solver.placement.local_search import _kick
from helixbench.solver.placement.milp import Limits
from helixbench.solver.placement.progress import LiveLine, Printed, Progress
from helixbench.solver.problem.capacity import Capacities
from helixbench.solver.problem.plan import Objective
from helixbench.solver.questions.assemble import CUT_SHORT_NOTE
from helixbench.solver.questions.generate import make_cluster
from tests.solver.clusters import WORKLOAD, demo_cluster

SOLVE = (sys.executable, "-m", "helixbench", "solve")
PLAIN = re.compile(r"^ *\d+\.\d s  max-flow (none yet|[\d.]+)  bound [\d.]+ tokens/s(  gap [\d.]+%)?  \S.*$")


def test_the_live_line_goes_on_counting_between_two_moments() -> None:
    now = [10.0]
    line = LiveLine(lambda: now[0])
    assert "starting" in line.text()
    line.say(Progress(1.0, 50.0, 60.0, "neighbours"))
    now[0] = 14.5
    assert line.text().strip() == "4.5 s  max-flow 50.0  bound 60.0 tokens/s  gap 20.00%  neighbours"


def test_what_is_expected_comes_first_where_it_is_searched_for() -> None:
    line = LiveLine(lambda: 0.0)
    line.say(Progress(1.0, 50.0, 60.0, "neighbours", 40.25))
    assert line.text().strip() == "0.0 s  expected 40.2  max-flow 50.0  bound 60.0 tokens/s  gap 20.00%  neighbours"


def test_only_a_search_for_what_is_expected_tells_of_it() -> None:
    objectives: tuple[Objective, ...] = ("throughput", "max-flow")
    for objective in objectives:
        told: list[Progress] = []
        solve_placement(
            SolveConfig(cluster=demo_cluster(), workload=WORKLOAD, objective=objective, time_limit_s=1), told.append
        )
        known = [moment.expected_tokens_per_s for moment in told if moment.incumbent_tokens_per_s is not None]
        assert known
        assert all((value is not None) == (objective == "throughput") for value in known)


def test_plain_lines_say_each_thing_once(capsys: pytest.CaptureFixture[str]) -> None:
    printed = Printed()
    for seconds in (0.1, 0.2):
        printed.say(Progress(seconds, None, 60.0, "program"))
    printed.say(Progress(0.3, 50.0, 60.0, "program"))
    assert capsys.readouterr().err.splitlines() == [
        "   0.1 s  max-flow none yet  bound 60.0 tokens/s  program",
        "   0.3 s  max-flow 50.0  bound 60.0 tokens/s  gap 20.00%  program",
    ]


def test_without_a_terminal_every_line_is_plain(tmp_path: Path) -> None:
    save_record(tmp_path / "c.json", make_cluster(num_nodes=12, num_types=3, num_regions=1, seed=2))
    limits = ["--objective", "max-flow", "--time-limit-s", "1", "--concurrency", "4"]
    done = subprocess.run([*SOLVE, "c.json", *limits], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *lines, last = done.stderr.splitlines()
    assert last == "plan written to plan.json"
    assert lines
    assert all(PLAIN.match(line) for line in lines), lines


def test_on_a_terminal_the_line_is_live(tmp_path: Path) -> None:
    save_record(tmp_path / "c.json", make_cluster(num_nodes=24, num_types=3, num_regions=3, seed=2))
    ours, theirs = pty.openpty()
    limits = ["--objective", "max-flow", "--time-limit-s", "2", "--concurrency", "4"]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    process = subprocess.Popen(
        [*SOLVE, "c.json", *limits], cwd=tmp_path, stderr=theirs, stdout=subprocess.DEVNULL, env=environment
    )
    os.close(theirs)
    drawn = _read_all(ours)
    shown = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", drawn)  # without colours and cursor movements
    assert process.wait(timeout=60) == 0, shown
    assert "\x1b[2K" in drawn, "the line is erased to be drawn again"
    moments = re.findall(r"([\d.]+) s  max-flow ([\d.]+)  bound ([\d.]+) tokens/s  gap ([\d.]+)%", shown)
    assert len({seconds for seconds, *_ in moments}) >= 3, shown


def _read_all(descriptor: int) -> str:
    shown = b""
    while True:
        try:
            part = os.read(descriptor, 4096)
        except OSError:  # what Linux answers when the other end is closed
            break
        if not part:
            break
        shown += part
    os.close(descriptor)
    return shown.decode()


@pytest.mark.parametrize("objective", ["max-flow", "throughput"])
def test_ctrl_c_ends_the_search_and_writes_the_best_plan_so_far(tmp_path: Path, objective: str) -> None:
    profile = make_cluster(num_nodes=42, num_types=7, num_regions=3, seed=9)
    save_record(tmp_path / "c.json", profile)
    process = subprocess.Popen(
        [*SOLVE, "c.json", "--objective", objective, "--time-limit-s", "200", "--concurrency", "4"],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "gap" in line:  # there is a plan
            break
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert "Traceback" not in said
    plan = load_record(tmp_path / "plan.json", Plan)
    assert plan.solver.status == "interrupted"
    assert not list(problems_of(profile, plan))


def test_the_first_plan_for_50_nodes_takes_a_flow_and_its_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    profile = make_cluster(num_nodes=50, num_types=6, num_regions=3, seed=4)
    flows: list[Flow] = []

    def counted(*arguments: Any, **options: Any) -> Flow:
        flows.append(max_flow(*arguments, **options))
        return flows[-1]

    def stop_at_the_first_plan(moment: Progress) -> None:
        if moment.incumbent_tokens_per_s is not None:
            raise KeyboardInterrupt

    monkeypatch.setattr(incumbent, "max_flow", counted)
    plan = solve_placement(SolveConfig(cluster=profile, workload=WORKLOAD), stop_at_the_first_plan)
    assert isinstance(plan, Plan)
    assert plan.solver.status == "interrupted"
    assert len(flows) == 2


def test_ctrl_c_while_the_plan_is_simulated_still_gives_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    profile = demo_cluster()
    monkeypatch.setattr("helixbench.solver.questions.assemble.best_limits", interrupt)
    plan = solve_placement(SolveConfig(cluster=profile, workload=WORKLOAD, concurrency=4, time_limit_s=1))
    assert isinstance(plan, Plan)
    assert plan.is_interrupted
    assert not list(problems_of(profile, plan))
    assert CUT_SHORT_NOTE in plan.assumptions.notes


def test_time_is_kept_for_simulating_the_plan() -> None:
    capacities = Capacities(demo_cluster(), WORKLOAD)
    for_flow = Search(capacities, "max-flow", Limits(time_s=60.0), lambda _: None)
    expected = Search(capacities, "throughput", Limits(time_s=60.0), lambda _: None)
    assert 30.0 < expected.left() <= 36.0 < for_flow.left()


def test_a_kick_ends_when_time_is_up() -> None:
    """A large cluster has many neighbours to list; none of them is once time is up."""
    profile = make_cluster(num_nodes=60, num_types=4, num_regions=4, seed=19)
    capacities = Capacities(profile, WORKLOAD)
    search = Search(capacities, "max-flow", Limits(time_s=1e-9), lambda _: None)
    search.offer(METHODS["petals"](capacities), "petals placement")
    assert _kick(search, random.Random(0), 0.0, most_moves=4) is None
    assert _kick(search, random.Random(0), 1e9, most_moves=4) != search.best


def test_the_search_ends_early_enough_to_write_up_its_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 0.0

    def slowly(*arguments: Any, **options: Any) -> Flow:
        nonlocal now_s
        now_s += 4.0
        return max_flow(*arguments, **options)

    clock = SimpleNamespace(perf_counter=lambda: now_s, process_time=lambda: now_s)
    monkeypatch.setattr(incumbent, "time", clock)
    monkeypatch.setattr(incumbent, "max_flow", slowly)
    capacities = Capacities(make_cluster(num_nodes=10, num_types=3, num_regions=1, seed=0), WORKLOAD)
    search = Search(capacities, "max-flow", Limits(time_s=100.0), lambda _: None, started=0.0)
    assert search.left() == 100.0
    assert search.offer(METHODS["petals"](capacities), "petals placement")
    assert search.left() == 100.0 - 4.0 - WRITE_UP * 4.0
