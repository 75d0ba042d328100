"""The closed loop on real agents, and the process that runs it."""

from __future__ import annotations

import itertools
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from helixbench.errors import MeasurementError
from helixbench.records import digest, load_record, save_record
from helixbench.reference_server.coordinator.bench import BenchResult, run_bench
from helixbench.reference_server.coordinator.bench_load import BenchConfig
from helixbench.reference_server.coordinator.engine import Engine
from helixbench.reference_server.coordinator.options import AdaptOptions
from helixbench.reference_server.jobs import driver
from helixbench.reference_server.jobs.job import BenchJob, encode_job
from helixbench.reference_server.run_log import LatencyLimits, OutputCheck, RunLog
from helixbench.reference_server.wire import client
from helixbench.solver.problem.arrivals import Arrivals, timed_requests
from helixbench.solver.problem.plan import Plan
from helixbench.solver.problem.traces import TracedRequest
from helixbench.solver.problem.workload import Workload, fixed_workload
from helixbench.solver.scheduling.coordinator import Coordinator
from helixbench.solver.scheduling.requests import Request, TokenEvent
from tests.conftest import ModelDir
from tests.hash_models import make_small
from tests.reference_server.plans import ONE_NODE, THREE_IN_A_ROW, TWO_PIPELINES, make_plan
from tests.reference_server.running import AgentProcess, RunningAgents

WORKLOAD = Workload(source="mixed", lengths=((5, 9), (30, 4), (12, 1), (1, 17)))
CONCURRENCY = 6
OUTPUT_TIMEOUT_S = 60.0


def config(**changes: Any) -> BenchConfig:
    made = BenchConfig(workload=WORKLOAD, concurrency=CONCURRENCY, seed=3, vocab_size=320, num_requests=20)
    return msgspec.structs.replace(made, **changes)


class Counting:
    """Watches an engine: what it tells the load between the two times that it is asked for counters."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._step, self._ask = engine.step, engine.ask_counters
        self.num_asked = 0
        self.in_window: list[TokenEvent] = []
        self.window_prompts = 0
        self.prompts: dict[int, int] = {}  # request -> prompt tokens
        self.first_tokens: set[int] = set()
        self.in_flight: set[int] = set()  # numbers of requests in flight and waiting, ever seen
        engine.step = self.step  # type: ignore[method-assign]
        engine.ask_counters = self.ask_counters  # type: ignore[method-assign]
        submit = engine.submit

        def note_and_submit(requests: list[Request]) -> list[TokenEvent]:
            self.prompts |= {request.number: len(request.prompt) for request in requests}
            return submit(requests)

        engine.submit = note_and_submit  # type: ignore[method-assign, assignment]

    def ask_counters(self) -> None:
        self.num_asked += 1
        self._ask()

    def step(
        self, timeout_ms: int, *, on_events: Callable[[list[TokenEvent]], list[Request]] = lambda _events: []
    ) -> None:
        def counted(events: list[TokenEvent]) -> list[Request]:
            if self.num_asked == 1:
                self.in_window += events
                self.window_prompts += sum(
                    self.prompts[event.request] for event in events if event.request not in self.first_tokens
                )
            self.first_tokens |= {event.request for event in events}
            new = on_events(events)
            self.prompts |= {request.number: len(request.prompt) for request in new}
            return new

        self._step(timeout_ms, on_events=counted)
        self.in_flight.add(self._engine.coordinator.num_in_flight + self._engine.coordinator.num_waiting)


@contextmanager
def engine_of(running: RunningAgents, model: Path, plan: Any = TWO_PIPELINES, **options: Any) -> Iterator[Engine]:
    with running.engine(make_plan(model, *plan, **options), model) as engine:
        yield engine


def test_the_window_counts_what_came_inside_and_the_loop_stays_full(
    running: RunningAgents, model_dir: ModelDir
) -> None:
    with engine_of(running, model_dir("test-llama")) as engine:
        watched = Counting(engine)
        result = run_bench(engine, config())

    assert watched.in_flight == {CONCURRENCY}, "a request that ends is followed by another at once"
    assert watched.num_asked == 2
    assert result.output_tokens == len(watched.in_window)
    assert result.prompt_tokens == watched.window_prompts
    ended = [event for event in watched.in_window if event.reason]
    inside = [r for r in result.requests if result.window.start_s <= r.finish_s < result.window.end_s]
    assert len(inside) == len(ended) >= 20
    assert len(result.requests) - len(inside) >= CONCURRENCY, "the warm-up is over when as many have finished"
    assert result.cut_short == ""


def test_requests_are_those_of_the_workload(running: RunningAgents, model_dir: ModelDir) -> None:
    results: list[BenchResult] = []
    for seed in (3, 3, 4):
        with engine_of(running, model_dir("test-llama")) as engine:
            results.append(run_bench(engine, config(seed=seed, concurrency=1, num_requests=12)))

    shapes = [[(r.prompt_tokens, r.output_tokens) for r in result.requests[:12]] for result in results]
    assert shapes[0] == shapes[1] != shapes[2]
    assert set(shapes[0]) == set(WORKLOAD.lengths)
    for request in results[0].requests:
        assert request.arrival_s <= request.first_token_s <= request.finish_s
        assert request.pipeline in (0, 1)
    assert {r.pipeline for r in results[0].requests} == {0, 1}


def check_counts(result: BenchResult) -> None:
    """Nodes, links and requests agree, but for what was under way when the counters were read, both times."""
    total = result.prompt_tokens + result.output_tokens
    under_way = 2 * CONCURRENCY * WORKLOAD.max_kv_tokens
    first_nodes = [result.nodes[name] for name in ("n0", "n2")]
    ran = sum(node.prefill_tokens + node.decode_tokens for node in first_nodes)
    assert ran == pytest.approx(total, abs=under_way)
    links = {(link.src, link.dst): link for link in result.links}
    assert {pair for pair, link in links.items() if link.tokens} == {
        ("coordinator", "n0"),
        ("coordinator", "n2"),
        ("n0", "n1"),
        ("n2", "n3"),
        ("n1", "coordinator"),
        ("n3", "coordinator"),
    }
    opened = {pair for pair, link in links.items() if not link.tokens}
    assert opened == {("coordinator", "n1"), ("coordinator", "n3")}, "these are told of requests, and get no tokens"
    out = sum(link.tokens for (_, dst), link in links.items() if dst == "coordinator")
    assert out == pytest.approx(result.output_tokens, abs=CONCURRENCY)
    for src, dst in (("n0", "n1"), ("n2", "n3")):
        node = result.nodes[src]
        assert links[src, dst].tokens == node.prefill_tokens + node.decode_tokens, "read at one moment by one node"
        assert links[src, dst].messages == node.iterations
    for node in result.nodes.values():
        assert node.busy_s > 0
        assert 0 < node.kv_peak_tokens <= node.kv_capacity_tokens


def test_a_window_lasts_at_least_its_duration_and_adds_up(running: RunningAgents, model_dir: ModelDir) -> None:
    told: list[tuple[str, float, float]] = []
    with engine_of(running, model_dir("test-llama")) as engine:
        watched = Counting(engine)
        result = run_bench(
            engine,
            config(num_requests=None, duration_s=1.0, warmup_s=0.3),
            on_progress=lambda *progress: told.append(progress),
        )

    assert result.window.seconds >= 1.0
    assert result.window.start_s >= 0.3
    assert result.output_tokens == len(watched.in_window)
    check_counts(result)
    assert {phase for phase, _, _ in told} == {"warming up", "measuring"}
    assert told[-1] == ("measuring", 1.0, 1.0)
    intervals = [count.end_s for count in result.timeline]
    assert intervals == sorted(intervals)
    assert intervals[-1] == pytest.approx(result.window.end_s)
    before_end = [r for r in result.requests if r.finish_s < result.window.end_s]
    assert sum(count.output_tokens for count in result.timeline) >= sum(r.output_tokens for r in before_end)
    assert sum(count.output_tokens for count in result.timeline) >= result.output_tokens


def test_every_node_tells_its_batches_and_kv_use_over_the_run(running: RunningAgents, model_dir: ModelDir) -> None:
    with engine_of(running, model_dir("test-llama")) as engine:
        result = run_bench(engine, config(num_requests=None, duration_s=1.0))

    assert set(result.node_timeline) == set(result.nodes)
    for node, points in result.node_timeline.items():
        use = result.nodes[node]
        ends = [point.end_s for point in points]
        assert ends == sorted(ends)
        assert ends[-1] == result.window.end_s
        assert {p.kv_tokens <= use.kv_capacity_tokens and 0 <= p.busy <= 1 for p in points} == {True}
        assert max(p.kv_tokens for p in points) > 0
        batches = [p.batch_tokens for p in points if p.batch_tokens is not None]
        assert 0 < max(batches) <= CONCURRENCY
        starts = [ends[0] - (ends[1] - ends[0]), *ends[:-1]]
        seconds = sum(point.busy * (point.end_s - start) for start, point in zip(starts, points, strict=True))
        assert use.busy_s * 0.99 <= seconds <= result.window.end_s, "the series holds the warm-up, too"


def test_an_interrupt_ends_the_window_and_keeps_what_was_measured(running: RunningAgents, model_dir: ModelDir) -> None:
    phases: list[str] = []
    with engine_of(running, model_dir("test-llama")) as engine:
        result = run_bench(
            engine,
            config(num_requests=10**6),
            on_progress=lambda phase, *_: phases.append(phase),
            is_interrupted=lambda: phases.count("measuring") >= 5,
        )

    assert result.cut_short == "interrupted"
    assert result.output_tokens > 0
    assert phases.count("measuring") == 5


def test_an_interrupt_in_the_warm_up_measures_nothing(running: RunningAgents, model_dir: ModelDir) -> None:
    refused = pytest.raises(MeasurementError, match="interrupted during the warm-up: nothing was measured")
    with engine_of(running, model_dir("test-llama"), ONE_NODE) as engine, refused:
        run_bench(engine, config(), is_interrupted=lambda: True)


# The driver


class Job:
    """A bench job on the running agents, changed where a test wants it to fail."""

    def __init__(self, running: RunningAgents, model: Path, folder: Path) -> None:
        self.plan = make_plan(model, *THREE_IN_A_ROW, workload=fixed_workload(prompt_tokens=9, output_tokens=6))
        self.output = folder / "run.json"
        self._folder = folder
        self._fields: dict[str, Any] = {
            "command": "helixbench bench plan.json",
            "model": str(model),
            "addresses": dict(running.addresses),
            "key_file": running.key_file,
            "testbed": "agents of a test",
            "output": self.output,
            "workload": self.plan.assumptions.workload,
            "concurrency": 4,
            "routing": "iwrr",
            "seed": 0,
            "num_requests": 8,
        }

    def write(self, plan: Plan | None = None, **changes: Any) -> str:
        path = self._folder / "plan.json"
        save_record(path, plan or self.plan)
        job = BenchJob(plan=path, **(self._fields | changes))
        (self._folder / "job.json").write_bytes(encode_job(job))
        return str(self._folder / "job.json")


@pytest.fixture
def job(running: RunningAgents, model_dir: ModelDir, tmp_path: Path) -> Job:
    return Job(running, model_dir("test-llama"), tmp_path)


@pytest.fixture
def drive() -> Iterator[Callable[[str], int]]:
    """The driver in this process, signal handlers put back afterwards."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield lambda job_file: driver.main([job_file])
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_a_job_writes_a_run_log_that_names_its_plan(job: Job, drive: Callable[[str], int]) -> None:
    assert drive(job.write()) == 0

    run = load_record(job.output, RunLog)
    assert run.plan == job.plan
    assert run.provenance.inputs == {"plan": digest(job.plan)}
    assert run.provenance.command == "helixbench bench plan.json"
    assert run.pipelines == ((("n0", 0, 2), ("n1", 2, 4), ("n2", 4, 6)),)
    assert (run.concurrency, run.routing, run.testbed, run.cut_short) == (4, "iwrr", "agents of a test", "")
    assert len(run.requests_in_window()) >= 8
    assert set(run.nodes) == set(run.device_names) == {"n0", "n1", "n2"}
    assert run.output_tokens > 0
    assert run.regions == {"n0": "place of n0", "n1": "place of n1", "n2": "place of n2"}
    assert all(run.node_timeline[node] for node in run.nodes)
    assert not list(job.output.parent.glob(".run.json*")), "nothing is left beside it"


def test_a_job_of_an_open_loop_sends_all_that_arrive_and_counts_goodput(job: Job, drive: Callable[[str], int]) -> None:
    arrivals = Arrivals(kind="poisson", rate_per_s=50.0)
    limits = LatencyLimits(max_ttft_s=1e6)
    assert drive(job.write(arrivals=arrivals, concurrency=None, num_requests=12, limits=limits)) == 0

    run = load_record(job.output, RunLog)
    timed = itertools.islice(timed_requests(arrivals, run.workload), 12)
    came = sorted((r.arrival_s, r.prompt_tokens, r.output_tokens) for r in run.requests)
    assert came == list(timed), "each counts from when it was due"
    assert run.arrivals == "poisson, 50 requests/s"
    assert 1 <= run.concurrency <= 12
    assert len(run.requests_in_window()) == 12
    assert run.goodput_per_s == pytest.approx(12 / run.window.seconds)
    assert run.promised is None, "the plan does not hold its cluster's profile"


def test_a_replay_ends_with_its_last_request(job: Job, drive: Callable[[str], int]) -> None:
    trace = tuple(TracedRequest(0.2 * number, 4 + number, 3) for number in range(5))
    replay = Arrivals(kind="replay", speedup=10.0)
    assert drive(job.write(arrivals=replay, trace=trace, concurrency=2, num_requests=None)) == 0

    run = load_record(job.output, RunLog)
    came = sorted((round(r.arrival_s, 9), r.prompt_tokens) for r in run.requests)
    assert came == [(round(0.02 * number, 9), 4 + number) for number in range(5)]
    assert run.arrivals == "replay, 10 times as fast"
    assert run.is_limited


@pytest.fixture
def hash_job(running: RunningAgents, tmp_path: Path) -> Job:
    return Job(running, make_small(tmp_path / "hash").directory, tmp_path)


def test_outputs_of_a_hash_model_are_all_checked(
    hash_job: Job, drive: Callable[[str], int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert drive(hash_job.write()) == 0

    run = load_record(hash_job.output, RunLog)
    assert run.output_check == OutputCheck(num_checked=len(run.requests))
    said = f"outputs: {len(run.requests)} compared with the model's reference, none differs"
    assert said in capsys.readouterr().err.replace("\n", " ")


def test_a_run_with_an_output_that_differs_fails_and_names_the_requests(
    hash_job: Job, drive: Callable[[str], int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Once, two requests get each other's token."""
    swapped: list[int] = []
    real = Coordinator.sampled

    def sampled(self: Coordinator, tokens: tuple[tuple[int, int], ...], *rest: Any) -> Any:
        if not swapped and len(tokens) > 1 and tokens[0][1] != tokens[1][1]:
            (first, one), (second, other), *others = tokens
            swapped.extend(sorted((first, second)))
            tokens = ((first, other), (second, one), *others)
        return real(self, tokens, *rest)

    monkeypatch.setattr(Coordinator, "sampled", sampled)

    assert drive(hash_job.write()) == 3
    checked = load_record(hash_job.output, RunLog).output_check
    assert checked is not None
    assert [wrong.request for wrong in checked.differing] == swapped
    assert f"outputs: 2 of {checked.num_checked} differ" in (err := capsys.readouterr().err)
    assert all(f"request {request} from token" in err for request in swapped)


def test_outputs_of_other_models_are_not_kept(job: Job, drive: Callable[[str], int]) -> None:
    assert drive(job.write()) == 0
    assert load_record(job.output, RunLog).output_check is None


CASES: dict[str, tuple[Callable[[Job, ModelDir], str], str]] = {
    "plan for another model": (
        lambda job, model_dir: job.write(model=str(model_dir("test-qwen2"))),
        r"plan\.json: made for model test-llama \(6 layers, sha256:\w+\), but --model .*test-qwen2 has 6 layers",
    ),
    "plan for another testbed": (
        lambda job, _: job.write(addresses={"n0": "127.0.0.1:1", "x": "127.0.0.1:2"}),
        r"plan\.json: placement names n1, n2, which the testbed does not have \(it has n0, x\)",
    ),
    "no agent": (
        lambda job, _: job.write(addresses={"n0": "127.0.0.1:1", "n1": "127.0.0.1:2", "n2": "127.0.0.1:3"}),
        r"no answer within 1 s from n0 \(127\.0\.0\.1:1\).* Is each agent started, reachable, and holding the same key",
    ),
    "memory": (
        lambda job, _: job.write(plan=replaced(job.plan, kv_capacity_tokens=10**7)),
        r"node n\d: layers .* leave room for \d+ KV tokens of the 10000000 needed; give the node more memory",
    ),
    "nothing measured": (
        lambda job, _: job.write(plan=replaced(job.plan, max_batch_tokens=None)),
        r"plan: nodes\.n0\.max_batch_tokens is missing",
    ),
    "no room at all": (
        lambda job, _: job.write(plan=replaced(job.plan, kv_capacity_tokens=0)),
        r"node n\d: kv_capacity_tokens, max_batch_tokens, max_decode_batch: need >= 1, got 0, 24, None",
    ),
    "requests too long": (
        lambda job, _: job.write(
            plan=replaced(job.plan, kv_capacity_tokens=100), workload=fixed_workload(prompt_tokens=90, output_tokens=20)
        ),
        r"the workload's longest request needs 109 KV slots; the plan's pipelines hold 100 at most",
    ),
    "no model": (lambda job, _: job.write(model="/no/such/model"), r"--model /no/such/model: no such directory"),
    "no key": (lambda job, _: job.write(key_file=Path("/no/key")), r"/no/key: cannot be read"),
}


def replaced(plan: Plan, **changes: Any) -> Plan:
    nodes = {name: msgspec.structs.replace(node, **changes) for name, node in plan.nodes.items()}
    return msgspec.structs.replace(plan, nodes=nodes)


@pytest.mark.parametrize("case", CASES)
def test_what_does_not_fit_together_is_one_message_and_no_file(
    job: Job,
    model_dir: ModelDir,
    drive: Callable[[str], int],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    case: str,
) -> None:
    write, message = CASES[case]
    if case == "no agent":
        monkeypatch.setattr(client, "_CONNECT_S", 1.0)

    code = drive(write(job, model_dir))

    out, err = capsys.readouterr()
    assert code == 2
    assert out == ""
    assert err.startswith("helixbench: ")
    assert err.count("\n") == 1
    assert re.search(message, err), err
    assert not job.output.exists()
    assert not list(job.output.parent.glob(".run.json*"))


def test_a_model_that_is_no_longer_covered_ends_the_run_and_keeps_what_was_measured(
    job: Job,
    running: RunningAgents,
    drive: Callable[[str], int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    doomed = AgentProcess(running.key_file, tmp_path / "doomed.log")
    try:
        addresses = running.addresses | {"n1": doomed.address()}

        def update(_: object, phase: str, *__: float) -> None:
            if phase == "measuring":
                doomed.process.kill()

        monkeypatch.setattr(driver.Reporter, "update", update)
        code = drive(job.write(addresses=addresses, num_requests=10**6, adapt=AdaptOptions(outage_s=0.5)))
    finally:
        doomed.end()

    assert code == 3
    assert re.search(r"\d requests ended with an error, because the nodes that are left", capsys.readouterr().err)
    run = load_record(job.output, RunLog)
    assert run.failed_requests > 0
    assert [t.after for t in run.adaptation.transitions if t.node == "n1"][-1] == "lost"
    assert run.cut_short == f"{run.failed_requests} requests failed"


def test_ctrl_c_in_the_window_writes_what_was_measured(job: Job) -> None:
    argv = [sys.executable, "-m", "helixbench.reference_server.jobs.driver", job.write(num_requests=10**6)]
    with subprocess.Popen(argv, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        lines = []
        for line in process.stderr:
            lines.append(line)
            if "measuring" in line:
                process.send_signal(signal.SIGINT)
        code = process.wait(OUTPUT_TIMEOUT_S)

    assert code == 0, lines
    run = load_record(job.output, RunLog)
    assert run.cut_short == "interrupted"
    assert run.output_tokens > 0
    assert f"interrupted; what was measured until then is in {job.output}" in "".join(lines).replace("\n", " ")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_the_window_ends_the_job_with_3_and_no_file(
    job: Job,
    drive: Callable[[str], int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: int,
) -> None:
    real = driver.load_plan

    def interrupted_meanwhile(*arguments: Any, **options: Any) -> Engine:
        os.kill(os.getpid(), number)
        return real(*arguments, **options)

    monkeypatch.setattr(driver, "load_plan", interrupted_meanwhile)

    assert drive(job.write()) == 3
    assert "helixbench: interrupted during the warm-up: nothing was measured" in capsys.readouterr().err
    assert not job.output.exists()
