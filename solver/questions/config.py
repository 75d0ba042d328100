"""One question to the solver: cluster, workload, objective or target, and the limits of the search."""

from __future__ import annotations

import math

import msgspec

from helixbench.errors import InputError
from helixbench.profiler.cluster import ClusterProfile
from helixbench.solver.flow.pulp_solvers import HIGHS
from helixbench.solver.placement.baselines import METHODS
from helixbench.solver.placement.published import PUBLISHED
from helixbench.solver.problem.capacity import Capacities
from helixbench.solver.problem.plan import Expected, LayerRange, Objective, Placement
from helixbench.solver.problem.workload import Workload

MAX_SEED = 2**31 - 1
"""Largest seed that HiGHS accepts."""


class SolveConfig(msgspec.Struct, frozen=True, kw_only=True):
    """A question to the solver and its limits.

    Attributes:
        cluster: the profile to plan for.
        workload: lengths of requests.
        concurrency: requests in flight; ``None`` for as many as the KV caches hold.
        objective: ``throughput`` for the most expected tokens/s, ``max-flow`` for the largest flow.
        method: ``auto`` for the search, the name of a baseline, or ``published`` for the published formulation.
        max_tpot_s: upper limit of the expected time per output token.
        max_ttft_s: upper limit of the expected time to the first output token.
        min_tokens_per_s: plan the fewest nodes that are expected to give this.
        partial: whether a request may enter a node's range late.
        survive: nodes, 0 or 1, that the plan has to be able to lose, whichever they are.
        pins: node -> the range that it has to hold where it is used.
        before: the cluster as it is, if ``cluster`` is a change of it: the plan is then compared with a plan for it.
        start: a placement that the search begins with, such as the one that is served now.
        time_limit_s: the search ends by then with the best so far.
        threads: of the solver of integer programs.
        solver: its name, as PuLP has it or in short (``CBC``).
        seed: of everything random.

    Raises:
        InputError: a field out of range, or two that ask for different plans.
    """

    cluster: ClusterProfile
    workload: Workload
    concurrency: int | None = None
    objective: Objective = "throughput"
    method: str = "auto"
    max_tpot_s: float | None = None
    max_ttft_s: float | None = None
    min_tokens_per_s: float | None = None
    partial: bool = True
    survive: int = 0
    pins: dict[str, LayerRange] = {}
    before: ClusterProfile | None = None
    start: Placement | None = None
    time_limit_s: float = 60.0
    threads: int = 1
    solver: str = HIGHS
    seed: int = 0

    def __post_init__(self) -> None:
        known = ("auto", *METHODS, PUBLISHED)
        if self.method not in known:
            raise InputError(f"--method {self.method}: no such method; choose from {', '.join(known)}")
        if not 0 < self.time_limit_s < math.inf:
            raise InputError(f"--time-limit-s {self.time_limit_s}: need a finite limit of more than 0 seconds")
        if not 0 <= self.seed <= MAX_SEED:
            raise InputError(f"--seed {self.seed}: need 0 to {MAX_SEED}")
        if self.threads < 1:
            raise InputError(f"--threads {self.threads}: need at least 1")
        if self.concurrency is not None and self.concurrency < 1:
            raise InputError(f"--concurrency {self.concurrency}: need at least 1 request in flight")
        if self.survive not in (0, 1):
            raise InputError(f"--survive {self.survive}: need 0 or 1, the number of nodes that may be lost")
        self._require_one_target()
        self._require_pins()

    def _require_one_target(self) -> None:
        limits = (self.max_tpot_s, self.max_ttft_s, self.min_tokens_per_s)
        if any(limit is not None and not limit > 0 for limit in limits):
            raise InputError("--max-tpot-s, --max-ttft-s, --min-tokens-per-s: need more than 0")
        if self.min_tokens_per_s is not None and self.has_latency_limit:
            raise InputError("--min-tokens-per-s and a latency limit ask for two different plans; give one")
        if self.objective == "max-flow" and self.has_target:
            raise InputError("latency and throughput targets need --objective throughput")

    def _require_pins(self) -> None:
        nodes = {node.name: node for node in self.cluster.nodes}
        for name, held in self.pins.items():
            if name not in nodes:
                raise InputError(f"--pin {name}={held}: no node {name!r}; there are {', '.join(nodes)}")
            if held.num_layers > nodes[name].max_layers:
                raise InputError(f"--pin {name}={held}: {name} holds at most {nodes[name].max_layers} layers")
            if held.end > self.cluster.model.num_layers:
                raise InputError(f"--pin {name}={held}: the model has {self.cluster.model.num_layers} layers")

    @property
    def has_latency_limit(self) -> bool:
        """Whether a latency is limited."""
        return self.max_tpot_s is not None or self.max_ttft_s is not None

    @property
    def has_target(self) -> bool:
        """Whether a latency is limited or a throughput is asked for."""
        return self.has_latency_limit or self.min_tokens_per_s is not None

    def is_met_by(self, expected: Expected) -> bool:
        """Whether every target is met; an unknown latency meets none."""
        latencies = ((expected.tpot_s, self.max_tpot_s), (expected.ttft_s, self.max_ttft_s))
        if any(limit is not None and (given is None or given > limit) for given, limit in latencies):
            return False
        return self.min_tokens_per_s is None or expected.total_tokens_per_s >= self.min_tokens_per_s

    def on(self, cluster: ClusterProfile) -> SolveConfig:
        """The same question about another cluster, without pins of nodes that it does not have."""
        there = {node.name for node in cluster.nodes}
        pins = {name: held for name, held in self.pins.items() if name in there}
        return msgspec.structs.replace(self, cluster=cluster, before=None, pins=pins)

    def capacities(self) -> Capacities:
        """Capacities of the cluster's nodes for the workload."""
        return Capacities(
            self.cluster,
            self.workload,
            concurrency=self.concurrency,
            pins=self.pins,
            partial=self.partial,
            survive=self.survive,
        )
