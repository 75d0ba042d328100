"""Plan: which node holds which layers, the flow over every link, and the predictions. The file ``plan.json``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar, Literal, TypeAlias

import msgspec

from helixbench.profiler.cluster import COORDINATOR, ClusterProfile
from helixbench.records import Provenance, require_unique
from helixbench.solver.problem.workload import Workload


class LayerRange(msgspec.Struct, frozen=True, array_like=True, order=True):
    """Half-open range of decoder layers ``[start, end)``; layer 0 is the first. In JSON: ``[start, end]``."""

    start: int
    end: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end:
            raise ValueError(f"layer range: need 0 <= start < end, got [{self.start}, {self.end})")

    @property
    def num_layers(self) -> int:
        """Layers held."""
        return self.end - self.start

    def __str__(self) -> str:
        return f"[{self.start},{self.end})"


def joined(ranges: Iterable[LayerRange]) -> list[LayerRange]:
    """The same layers in as few ranges as possible, in order."""
    found: list[LayerRange] = []
    for held in sorted(ranges):
        if found and held.start <= found[-1].end:
            found[-1] = LayerRange(found[-1].start, max(found[-1].end, held.end))
        else:
            found.append(held)
    return found


Placement: TypeAlias = dict[str, LayerRange]
"""Node -> the layer range that it holds; a node that is left out holds nothing."""


class Hop(msgspec.Struct, frozen=True, array_like=True, order=True):
    """One step of a pipeline: a node runs layers ``[start, end)`` of a request's tokens."""

    node: str
    start: int
    end: int


Pipeline: TypeAlias = tuple[Hop, ...]
"""A request's path: its hops join up and together cover ``[0, num_layers)``."""


class LinkFlow(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Flow over a link against what the link can carry, tokens/s."""

    src: str
    dst: str
    flow_tokens_per_s: float
    capacity_tokens_per_s: float


class NodeFlow(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """Flow through a node against its capacity at its layer range, tokens/s, with requests entering as the flows do.

    ``kv_capacity_tokens`` is the number of tokens whose KV cache fits beside the weights. ``max_batch_tokens`` is the
    largest iteration that was profiled, and so the largest that is run; ``None`` where the node was not measured.
    ``device`` is the profile's, ``region`` what the links say (``problem.regions``), for whoever reads the plan;
    ``made_on`` is what the profile holds for (device facts and versions), against which a node is checked before it
    serves.
    """

    flow_tokens_per_s: float
    capacity_tokens_per_s: float
    kv_capacity_tokens: int | None = None
    max_batch_tokens: int | None = None
    device: str = ""
    region: str = ""
    made_on: dict[str, str] = {}


class Percentiles(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Seconds within which half, 90 % and 99 % of the requests are."""

    p50_s: float
    p90_s: float
    p99_s: float


class Expected(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """Predicted throughput and latency with ``concurrency`` requests in flight; totals count prompt and output tokens.

    ``low`` and ``high`` bound ``total_tokens_per_s`` by the held-out error of the cost models; ``None`` where the nodes
    have only capacity tables. ``node_busy`` is each node's share of time in iterations, ``node_batch_tokens`` its mean
    decode tokens an iteration, ``node_share`` the share of all tokens that pass it and ``link_share`` (source ->
    destination -> share) that of a link: where KV caches fill up, these are not the shares of the flows. ``ttft_s``
    and ``tpot_s`` are means, from when a client sends the request, or from its admission where requests always wait for
    room. For arrivals of an open loop there is ``goodput_per_s`` (requests/s within the limits that were set), and
    ``concurrency`` is the most in flight.
    """

    concurrency: int
    total_tokens_per_s: float
    output_tokens_per_s: float
    ttft_s: float | None = None
    tpot_s: float | None = None
    low_total_tokens_per_s: float | None = None
    high_total_tokens_per_s: float | None = None
    in_flight: float | None = None
    node_busy: dict[str, float] = {}
    node_batch_tokens: dict[str, float] = {}
    node_share: dict[str, float] = {}
    link_share: dict[str, dict[str, float]] = {}
    ttft: Percentiles | None = None
    tpot: Percentiles | None = None
    goodput_per_s: float | None = None


class Marginal(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Change of the placement's max-flow with 1 % more, and with 1 % less, of a full resource.

    ``resource`` is a node, a link ``src -> dst``, or one direction of a NIC. In a row of equal
    bottlenecks more of one alone adds nothing, and less of one takes its whole part.
    """

    resource: Literal["node", "link", "nic out", "nic in"]
    name: str
    gain_tokens_per_s: float
    loss_tokens_per_s: float


class ExpectedBound(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Upper bound on the expected throughput of any plan, in the long run, with ``in_flight`` requests at most.

    The bound on max-flow, or ``in_flight`` requests over the least round trip of any placement, whichever is less.
    ``least_tpot_s`` and ``least_ttft_s`` are those of a token alone in the cluster.
    """

    in_flight: int
    tokens_per_s: float
    least_tpot_s: float
    least_ttft_s: float


class AfterLoss(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Max-flow of what is left of a placement after the loss of a node, and the total tokens/s expected of it."""

    max_flow_tokens_per_s: float
    expected_tokens_per_s: float


class Survival(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """The cost of a placement that goes on after the loss of any one node (N-1 cover), and how it goes on.

    ``after_loss`` has an entry for each node. ``price_tokens_per_s`` is the objective's value of the best plan found
    without this requirement, less this plan's. No plan that survives costs less than ``least_price_tokens_per_s``, as
    far as that is proven. Both are ``None`` where the question has a target of its own.
    """

    after_loss: dict[str, AfterLoss]
    price_tokens_per_s: float | None = None
    least_price_tokens_per_s: float | None = None


class Predicted(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """The two numbers, never one: the bound (``max_flow`` of this plan, ``upper_bound`` of any plan) and the expected.

    ``gap`` is ``(upper_bound - max_flow) / max_flow``. ``bottleneck`` names the min cut, in words. ``marginal`` has an
    entry for each full resource that limits the flow, where there are not too many. ``bound_of_expected`` is to
    ``expected`` what ``upper_bound`` is to ``max_flow``; ``least_nodes`` is a lower bound on the nodes of any plan with
    the tokens/s asked for. ``survival`` is there where the plan has to survive the loss of a node.
    """

    max_flow_tokens_per_s: float
    upper_bound_tokens_per_s: float
    gap: float
    expected: tuple[Expected, ...] = ()
    bottleneck: tuple[str, ...] = ()
    marginal: tuple[Marginal, ...] = ()
    bound_of_expected: ExpectedBound | None = None
    least_nodes: int | None = None
    survival: Survival | None = None


Objective: TypeAlias = Literal["throughput", "max-flow"]
"""What a search maximises: expected tokens/s, or the max-flow."""


class Assumptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """Conditions of the predictions.

    ``objective`` is what the search maximised, ``survive`` the number of nodes that the plan has to be able to lose.
    """

    workload: Workload
    partial_inference: bool
    objective: Objective
    survive: int = 0
    concurrency: int | None = None
    notes: tuple[str, ...] = ()


SearchStatus: TypeAlias = Literal["optimal", "time limit", "interrupted", "search done", "not searched"]
"""Why a search ended: a proof, its time limit, Ctrl-C, nothing left to try; or the placement was made without one."""


class SolverFacts(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """How the plan was found."""

    method: str
    backend: str
    seconds: float
    status: SearchStatus
    seed: int = 0
    threads: int = 1


class Plan(
    msgspec.Struct,
    frozen=True,
    forbid_unknown_fields=True,
    kw_only=True,
    omit_defaults=True,
    tag_field="schema",
    tag="helixbench.plan/2",
):
    """A placement with its flows. A node that is not in ``placement`` is not used.

    ``max_decode_batch`` limits the decoding sequences in an iteration, so that requests stay spread over the stages.
    ``cluster_digest`` and ``model_digest`` tell the cluster profile and the model that it was made for, ``dtype`` how
    the model was run. ``cluster`` is that profile without its samples, where all of it was measured: what is served is
    adapted by it.
    """

    remade_by: ClassVar[str] = "helixbench solve"

    model: str
    num_layers: int
    placement: dict[str, LayerRange]
    flows: tuple[LinkFlow, ...]
    nodes: dict[str, NodeFlow]
    predicted: Predicted
    assumptions: Assumptions
    solver: SolverFacts
    cluster_digest: str = ""
    model_digest: str = ""
    dtype: str = ""
    max_decode_batch: int | None = None
    cluster: ClusterProfile | None = None
    provenance: Provenance = Provenance()

    def __post_init__(self) -> None:
        if not self.placement:
            raise ValueError("placement: need at least one node")
        for name, held in self.placement.items():
            if name == COORDINATOR:
                raise ValueError("placement: the coordinator holds no layers")
            if held.end > self.num_layers:
                raise ValueError(f"placement.{name}: {held} goes beyond the model's {self.num_layers} layers")
        self._require_covered()
        if set(self.nodes) != set(self.placement):
            odd = ", ".join(sorted(set(self.nodes) ^ set(self.placement)))
            raise ValueError(f"nodes: need the nodes of `placement`, no more and no less; differs in {odd}")
        require_unique([f"{flow.src} -> {flow.dst}" for flow in self.flows], field="flows")
        known = {COORDINATOR, *self.placement}
        for flow in self.flows:
            if flow.src not in known or flow.dst not in known:
                raise ValueError(f"flows: {flow.src} -> {flow.dst} names a node that holds no layers")

    @property
    def objective_tokens_per_s(self) -> float:
        """Value of the objective: the max-flow, or the expected total at the concurrency asked for."""
        if self.assumptions.objective == "max-flow":
            return self.predicted.max_flow_tokens_per_s
        return self.predicted.expected[-1].total_tokens_per_s

    @property
    def is_interrupted(self) -> bool:
        """Whether Ctrl-C ended the search."""
        return self.solver.status == "interrupted"

    def _require_covered(self) -> None:
        reached = 0
        for held in sorted(self.placement.values()):
            if held.start > reached:
                raise ValueError(f"placement: layers [{reached},{held.start}) are held by no node")
            reached = max(reached, held.end)
        if reached < self.num_layers:
            raise ValueError(f"placement: layers [{reached},{self.num_layers}) are held by no node")


class Infeasible(
    msgspec.Struct,
    frozen=True,
    forbid_unknown_fields=True,
    kw_only=True,
    tag_field="schema",
    tag="helixbench.infeasible/1",
):
    """The answer that no plan exists, and why: ``reason`` is one sentence for a person."""

    reason: str
