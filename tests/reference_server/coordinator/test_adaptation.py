"""Real agents are killed, frozen, restarted and contended for while an engine serves on them: nothing is lost."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from helixbench.profiler.model.hash_model import HashModel
from helixbench.profiler.model.hash_reference import Output, first_differences
from helixbench.reference_server.coordinator.engine import Engine
from helixbench.reference_server.coordinator.loading import AdaptOptions
from helixbench.reference_server.run_log import Recovered, Replanned, Transition
from helixbench.reference_server.wire.client import AgentFailedError
from helixbench.reference_server.wire.keys import make_key_file
from helixbench.solver.problem.plan import Plan
from helixbench.solver.scheduling.requests import Request
from helixbench.solver.scheduling.watch import NodeState
from tests.hash_models import make_small
from tests.reference_server.hash_cluster import mixed_requests
from tests.reference_server.plans import make_plan
from tests.reference_server.running import AgentProcess, Outcome, RunningAgents
from tests.reference_server.simulation.cases import cluster as simulated_cluster

# 6 layers on 4 nodes: any one of them can go
PLACEMENT = {"a": (0, 3), "b": (3, 6), "c": (0, 4), "d": (2, 6)}
PATHS = [(["a", "b"], 1.0), (["c", "d"], 1.0), (["a", "d"], 1.0)]
END_S = 60.0
MEMORY_BYTES = 5e6  # of a node that may be given other layers


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> HashModel:
    return make_small(tmp_path_factory.mktemp("models") / "small")


@pytest.fixture
def plan(model: HashModel) -> Plan:
    return make_plan(model.directory, PLACEMENT, PATHS, kv_capacity_tokens=3000)


class Cluster:
    """Agents of the plan, each a process, and where each listens."""

    def __init__(self, folder: Path) -> None:
        self.key_file = folder / "cluster.key"
        make_key_file(self.key_file)
        self.agents = {node: AgentProcess(self.key_file, folder / f"{node}.log") for node in PLACEMENT}
        self.running = RunningAgents({node: agent.address() for node, agent in self.agents.items()}, self.key_file)

    def restart(self, node: str, folder: Path) -> None:
        """Another process takes the place of a dead one, at its address."""
        self.agents[node].end()
        listen = self.running.addresses[node]
        self.agents[node] = AgentProcess(self.key_file, folder / f"{node}-again.log", listen=listen)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    made = Cluster(tmp_path)
    try:
        yield made
    finally:
        for agent in made.agents.values():
            agent.end()


@contextmanager
def serving(cluster: Cluster, plan: Plan, model: HashModel, **options: float) -> Iterator[Engine]:
    with cluster.running.engine(plan, model.directory, options=AdaptOptions(**options)) as engine:  # type: ignore[arg-type]
        yield engine


class Run:
    """Requests on an engine, more of which come as long as a test wants."""

    def __init__(self, engine: Engine, model: HashModel) -> None:
        self.engine, self._model = engine, model
        self.requests: list[Request] = []
        self.outcome = Outcome()

    def submit(self, count: int) -> None:
        new = mixed_requests(len(self.requests) + count, seed=1, vocab_size=self._model.vocab_size)[-count:]
        self.requests += new
        self.outcome.note(self.engine.submit(new))

    def step_until(self, is_so: Callable[[], bool], *, keep_busy: bool = False) -> None:
        deadline = time.monotonic() + END_S
        while not is_so():
            assert time.monotonic() < deadline, "it does not come to that"
            self.engine.step(50, on_events=self.outcome.note)
            if keep_busy and len(self.requests) - len(self.outcome.reasons) < 20:
                self.submit(20)

    def finish(self) -> None:
        self.step_until(lambda: len(self.outcome.reasons) == len(self.requests))

    def wrong(self) -> dict[int, int]:
        """Requests that did not get exactly the reference's tokens."""
        outputs = [Output(one.number, one.prompt, self.outcome.tokens[one.number]) for one in self.requests]
        assert [len(output.tokens) for output in outputs] == [one.max_tokens for one in self.requests]
        model = self._model
        return first_differences(outputs, num_layers=model.num_layers, vocab_size=model.vocab_size)

    def state(self, node: str) -> NodeState:
        assert self.engine.adaptation is not None
        return self.engine.adaptation.watch.states[node]

    def causes(self, node: str, after: str) -> list[str]:
        assert self.engine.adaptation is not None
        log = self.engine.adaptation.log
        return [t.cause for t in log if isinstance(t, Transition) and t.node == node and t.after == after]

    def num_recovered(self) -> int:
        assert self.engine.adaptation is not None
        log = self.engine.adaptation.log
        return sum(r.replayed + r.prefilled + r.moved + r.waited for r in log if isinstance(r, Recovered))


@pytest.mark.parametrize("node", list(PLACEMENT))
def test_a_killed_agent_costs_no_request(cluster: Cluster, plan: Plan, model: HashModel, node: str) -> None:
    with serving(cluster, plan, model) as engine:
        run = Run(engine, model)
        run.submit(60)
        run.step_until(lambda: bool(run.outcome.tokens))
        cluster.agents[node].send_signal(signal.SIGKILL)
        run.step_until(lambda: run.state(node) is NodeState.LOST, keep_busy=True)
        run.finish()

    assert run.wrong() == {}
    assert run.causes(node, "lost") == ["its connection is closed"]
    assert run.num_recovered() > 0


def test_a_frozen_agent_is_given_up_and_taken_back(cluster: Cluster, plan: Plan, model: HashModel) -> None:
    with serving(cluster, plan, model) as engine:
        run = Run(engine, model)
        run.submit(60)
        run.step_until(lambda: bool(run.outcome.tokens))
        cluster.agents["b"].send_signal(signal.SIGSTOP)
        run.step_until(lambda: run.state("b") is NodeState.LOST, keep_busy=True)
        cluster.agents["b"].send_signal(signal.SIGCONT)
        run.step_until(lambda: run.state("b") in (NodeState.IDLE, NodeState.PROGRESSING), keep_busy=True)
        before = dict(engine.sent)["b"].messages
        run.submit(30)
        run.finish()

    assert run.wrong() == {}
    assert run.causes("b", "stalled") == ["its report is overdue"]
    assert run.causes("b", "lost") == ["its report is overdue"]
    assert engine.sent["b"].messages > before, "it serves again"


def test_an_agent_that_was_started_again_loads_its_stage_and_serves(
    cluster: Cluster, plan: Plan, model: HashModel, tmp_path: Path
) -> None:
    with serving(cluster, plan, model) as engine:
        run = Run(engine, model)
        run.submit(20)
        cluster.agents["d"].send_signal(signal.SIGKILL)
        run.step_until(lambda: run.state("d") is NodeState.LOST, keep_busy=True)
        cluster.restart("d", tmp_path)
        run.step_until(lambda: run.state("d") in (NodeState.IDLE, NodeState.PROGRESSING), keep_busy=True)
        before = engine.sent["d"].messages
        run.submit(30)
        run.finish()

    assert run.wrong() == {}
    assert engine.sent["d"].messages > before


def test_requests_wait_for_a_model_that_is_not_covered_and_then_end_with_an_error(
    cluster: Cluster, plan: Plan, model: HashModel
) -> None:
    with serving(cluster, plan, model, outage_s=1.5) as engine:
        run = Run(engine, model)
        run.submit(40)
        run.step_until(lambda: bool(run.outcome.tokens))
        for node in ("b", "d"):
            cluster.agents[node].send_signal(signal.SIGKILL)
        run.step_until(lambda: not engine.is_covered)
        run.finish()

        assert set(run.outcome.reasons.values()) <= {"length", "error"}
        assert "error" in run.outcome.reasons.values()
        assert engine.coordinator.num_in_flight == engine.coordinator.num_recovering == 0
        assert set(engine.coordinator.kv_held_tokens.values()) == {0}


def test_an_agent_serves_one_run_at_a_time(cluster: Cluster, plan: Plan, model: HashModel) -> None:
    with serving(cluster, plan, model) as engine:
        refused = pytest.raises(
            AgentFailedError, match=r"node [a-d]: it serves run [0-9a-f]{16} of .*; end that one first"
        )
        with refused as raised, serving(cluster, plan, model):
            pass
        assert raised.value.exit_code == 2
        run = Run(engine, model)
        run.submit(10)
        run.finish()
        assert run.wrong() == {}

        with serving(cluster, plan, model, take_over=True) as other:
            run.step_until(lambda: run.state("a") is NodeState.LOST)
            taken = Run(other, model)
            taken.submit(10)
            taken.finish()
            assert taken.wrong() == {}
    with serving(cluster, plan, model):
        pass  # the others have released them


def test_agents_of_a_coordinator_that_is_gone_are_free_after_a_while(
    cluster: Cluster, plan: Plan, model: HashModel
) -> None:
    with serving(cluster, plan, model) as engine:
        engine.release = lambda: None  # type: ignore[method-assign]
    deadline = time.monotonic() + END_S
    while True:
        try:
            with serving(cluster, plan, model):
                return
        except AgentFailedError:
            assert time.monotonic() < deadline
            time.sleep(0.2)


def test_a_drained_node_is_safe_to_remove(cluster: Cluster, plan: Plan, model: HashModel) -> None:
    with serving(cluster, plan, model) as engine:
        run = Run(engine, model)
        run.submit(40)
        run.step_until(lambda: bool(run.outcome.tokens))
        engine.drain("b")
        run.step_until(lambda: run.state("b") is NodeState.DRAINED, keep_busy=True)
        recovered = run.num_recovered()
        cluster.agents["b"].send_signal(signal.SIGKILL)
        run.step_until(lambda: run.state("b") is NodeState.LOST, keep_busy=True)
        run.finish()

    assert run.wrong() == {}
    assert recovered == run.num_recovered() == 0, "nothing was in flight on it"


def test_an_agent_that_is_told_to_end_is_drained_first(cluster: Cluster, plan: Plan, model: HashModel) -> None:
    with serving(cluster, plan, model) as engine:
        run = Run(engine, model)
        run.submit(40)
        run.step_until(lambda: bool(run.outcome.tokens))
        cluster.agents["c"].send_signal(signal.SIGTERM)
        run.step_until(lambda: run.state("c") is NodeState.LOST, keep_busy=True)
        run.finish()

    assert cluster.agents["c"].wait() == 0
    assert run.wrong() == {}
    assert run.causes("c", "draining") == ["its agent was told to end"]
    assert run.num_recovered() == 0


def test_layers_are_moved_where_the_nodes_that_are_left_do_not_cover_the_model(
    cluster: Cluster, model: HashModel
) -> None:
    """Two of four nodes hold the only copies of the middle; a plan of the others is found and served."""
    facts = model.facts(dtype="float32")
    profile = msgspec.structs.replace(
        simulated_cluster({"a": 1.0, "b": 1.0, "c": 1.0, "d": 1.0}, num_layers=6),
        model=facts,
        nodes=tuple(
            msgspec.structs.replace(node, device=msgspec.structs.replace(node.device, memory_bytes=MEMORY_BYTES))
            for node in simulated_cluster({"a": 1.0, "b": 1.0, "c": 1.0, "d": 1.0}, num_layers=6).nodes
        ),
    )
    placement = {"a": (0, 2), "b": (2, 4), "c": (4, 6)}
    by_hand = make_plan(model.directory, placement, [(["a", "b", "c"], 1.0)], kv_capacity_tokens=2000)
    plan = msgspec.structs.replace(by_hand, cluster=profile)
    with serving(cluster, plan, model) as engine:
        run = Run(engine, model)
        run.submit(40)
        run.step_until(lambda: bool(run.outcome.tokens))
        cluster.agents["b"].send_signal(signal.SIGKILL)
        run.step_until(lambda: not engine.is_covered)
        run.finish()
        run.submit(10)
        run.finish()

        assert run.wrong() == {}
        assert engine.adaptation is not None
        (replanned,) = [entry for entry in engine.adaptation.log if isinstance(entry, Replanned)]
        assert set(replanned.placement) <= {"a", "c"}
        assert engine.adaptation.plan.placement == replanned.placement
