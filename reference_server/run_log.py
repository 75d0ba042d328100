"""RunLog: what a run measured, beside the plan that it ran. The file ``run.json``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar, Literal

import msgspec
import numpy as np

from helixbench.errors import InputError
from helixbench.records import Provenance
from helixbench.solver.problem.plan import Expected, Placement, Plan
from helixbench.solver.problem.workload import Workload
from helixbench.solver.scheduling.history import History
from helixbench.solver.scheduling.work import Routing

NUM_INTERVALS = 60
"""Of a timeline, over the whole run."""
_NUM_NAMED = 5  # requests named in a line


class RequestRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """One request; times in seconds since the run began. ``pipeline`` indexes ``RunLog.pipelines``.

    ``admitted_s`` is when it was admitted, after waiting for KV slots; ``None`` where that was as it arrived.
    """

    arrival_s: float
    first_token_s: float
    finish_s: float
    prompt_tokens: int
    output_tokens: int
    pipeline: int
    admitted_s: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.arrival_s <= self.first_token_s <= self.finish_s < float("inf"):
            raise ValueError("request: need 0 <= arrival_s <= first_token_s <= finish_s")
        if self.prompt_tokens < 1 or self.output_tokens < 1:
            raise ValueError("request: need prompt_tokens and output_tokens >= 1")

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first; ``None`` below two output tokens."""
        if self.output_tokens < 2:
            return None
        return (self.finish_s - self.first_token_s) / (self.output_tokens - 1)


class LatencyLimits(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """What goodput counts: requests whose TTFT and TPOT are at most these, in seconds; ``None`` for no limit."""

    max_ttft_s: float | None = None
    max_tpot_s: float | None = None

    def __post_init__(self) -> None:
        for name in ("max_ttft_s", "max_tpot_s"):
            limit = getattr(self, name)
            if limit is not None and not 0 < limit < float("inf"):
                raise ValueError(f"{name}: need more than 0 seconds, got {limit:g}")

    def __str__(self) -> str:
        named = (("TTFT", self.max_ttft_s), ("TPOT", self.max_tpot_s))
        return ", ".join(f"{name} <= {limit:g} s" for name, limit in named if limit is not None)


def limits_of_options(max_ttft_s: float | None, max_tpot_s: float | None) -> LatencyLimits | None:
    """The limits that the command-line options set; ``None`` where they set none.

    Raises:
        InputError: a limit of no time.
    """
    if max_ttft_s is None and max_tpot_s is None:
        return None
    try:
        return LatencyLimits(max_ttft_s=max_ttft_s, max_tpot_s=max_tpot_s)
    except ValueError as error:
        raise InputError(f"--max-ttft-s, --max-tpot-s: {error}") from error


class NodeUse(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a node did inside the window.

    ``busy_s`` is time in iterations, batching and (de)serialising included. Of an emulated device, ``late_iterations``
    took longer than they were to take, and the others were released ``release_error_s`` too late, in all, by the wall
    clock.
    """

    busy_s: float
    iterations: int
    prefill_tokens: int
    decode_tokens: int
    kv_peak_tokens: int
    kv_capacity_tokens: int
    late_iterations: int = 0
    release_error_s: float = 0.0


class LinkUse(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What crossed a link inside the window. ``tokens`` counts each token once, as the plan's flow does."""

    src: str
    dst: str
    payload_bytes: int
    messages: int
    tokens: int


class Window(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The steady part of the run, seconds since the run began."""

    start_s: float
    end_s: float

    def __post_init__(self) -> None:
        if not 0 <= self.start_s < self.end_s < float("inf"):
            raise ValueError(f"window: need 0 <= start_s < end_s, got [{self.start_s}, {self.end_s})")

    @property
    def seconds(self) -> float:
        """Length."""
        return self.end_s - self.start_s


class TokenCount(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """Tokens in one interval of the run that ends at ``end_s``; a prompt counts when its first output token is out."""

    end_s: float
    prompt_tokens: int
    output_tokens: int


class NodePoint(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """A node in the interval that ends at ``end_s``: mean decode tokens an iteration, KV tokens in use at its end.

    ``batch_tokens`` is ``None`` where no iteration ended, ``busy`` the share of the interval spent in iterations.
    """

    end_s: float
    batch_tokens: float | None
    kv_tokens: int
    busy: float


class DifferingOutput(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """An output that is not the model's, from token ``first_token`` (the first is 0) on.

    ``request`` counts the requests of the run in the order of their arrival.
    """

    request: int
    first_token: int
    pipeline: int


class OutputCheck(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Outputs that were compared, token by token, with the reference of the model: those of all finished requests."""

    num_checked: int
    differing: tuple[DifferingOutput, ...] = ()

    @property
    def statement(self) -> str:
        """One line with the counts and the first requests whose output differs."""
        if not self.differing:
            return f"outputs: {self.num_checked} compared with the model's reference, none differs"
        named = [f"request {wrong.request} from token {wrong.first_token} on" for wrong in self.differing[:_NUM_NAMED]]
        more = [f"{len(self.differing) - _NUM_NAMED} more"] if len(self.differing) > _NUM_NAMED else []
        return (
            f"outputs: {len(self.differing)} of {self.num_checked} differ from the model's reference "
            f"({', '.join([*named, *more])})"
        )


class Transition(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """A node, or with ``peer`` the link to another one, went from one state to another, for a cause."""

    at_s: float
    node: str
    before: str
    after: str
    cause: str
    detail: str = ""
    peer: str = ""

    @property
    def line(self) -> str:
        """In words."""
        what = f"link {self.node} -> {self.peer}" if self.peer else f"node {self.node}"
        detail = f" ({self.detail})" if self.detail else ""
        return f"{what}: {self.before} -> {self.after}, {self.cause}{detail}"


class Reweighted(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """New requests are routed by other weights: (index in ``RunLog.pipelines``, share), of that max-flow in all."""

    at_s: float
    max_flow_tokens_per_s: float
    shares: tuple[tuple[int, float], ...]


class Replanned(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Nodes were given other layers, because those that were left did not cover the model; what is expected of them."""

    at_s: float
    placement: Placement
    expected_tokens_per_s: float | None


class Recovered(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Requests in flight lost their pipeline, all in one incident; one that had to try another way counts again.

    ``replayed`` went on from states that a node had kept, ``prefilled`` from their tokens, ``moved`` without computing
    anything again, and the others ``waited`` for room. ``layer_tokens_again`` tokens times layers ran again, of
    ``layer_tokens_held`` that the caches of these requests held.
    """

    at_s: float
    replayed: int
    prefilled: int
    moved: int
    waited: int
    layer_tokens_again: int
    layer_tokens_held: int


class Happened(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """An event that was made to happen, and what came of it.

    Attributes:
        at_s: when.
        kind: as in the file of events.
        node: whose event it is; of a link, its sender.
        peer: of a link, its receiver.
        factor: of speeds and rates.
        detected_s: from then until a state changed for it; ``None`` where none did.
        before_tokens_per_s: served in a settled time before, where there was one.
        after_tokens_per_s: likewise after.
        predicted_tokens_per_s: expected after, of the placement as it then was.
    """

    at_s: float
    kind: str
    node: str
    peer: str = ""
    factor: float | None = None
    detected_s: float | None = None
    before_tokens_per_s: float | None = None
    after_tokens_per_s: float | None = None
    predicted_tokens_per_s: float | None = None

    @property
    def what(self) -> str:
        """In words."""
        name = f"{self.node} -> {self.peer}" if self.peer else self.node
        return f"{self.kind} {name}" + (f" x {self.factor:g}" if self.factor is not None else "")


class AdaptationLog(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """What happened to nodes and links in a run, and what was done about it."""

    transitions: tuple[Transition, ...] = ()
    reweighted: tuple[Reweighted, ...] = ()
    recovered: tuple[Recovered, ...] = ()
    replanned: tuple[Replanned, ...] = ()
    events: tuple[Happened, ...] = ()

    @property
    def lost_nodes(self) -> frozenset[str]:
        """Nodes that were lost and had not come back when the run ended, or were given no layers any more."""
        last = {change.node: change.after for change in self.transitions if not change.peer}
        lost = {node for node, state in last.items() if state in ("lost", "loading")}
        if self.replanned:
            lost |= last.keys() - self.replanned[-1].placement.keys()
        return frozenset(lost)

    @property
    def is_empty(self) -> bool:
        """Whether nothing went wrong, and nothing changed."""
        return not (self.events or self.reweighted or self.recovered or any(t.after in _BAD for t in self.transitions))


_BAD = ("slow", "stalled", "lost", "draining", "drained", "down")


class RunLog(
    msgspec.Struct,
    frozen=True,
    forbid_unknown_fields=True,
    kw_only=True,
    omit_defaults=True,
    tag_field="schema",
    tag="helixbench.run/2",
):
    """One measured run of a plan.

    ``expected`` of ``plan.predicted`` at ``concurrency`` is what it is held against, or, where requests came at times
    of their own, ``promised``: the plan's simulation of the same requests. ``limits`` are those of goodput.
    ``pipelines`` lists every distinct pipeline that a request took, each a tuple of hops ``(node, start, end)``.
    ``timeline`` covers the run in equal intervals. ``arrivals`` says how requests came: a closed loop, ``offline`` (all
    from the start), or an open loop.
    ``is_limited`` is true where the number of requests, of those admitted, or another share of the KV caches was set.
    ``simulated`` is true where no hardware ran. ``cut_short`` says why a run ended before its time,
    ``stale`` where the profile was made on something else than was served on.
    ``output_check`` is ``None`` where the model has no reference to compare with.
    ``node_timeline`` is each node's own series (empty where none was kept), ``regions`` the place of each node.
    ``nodes`` has those that were there at the end. ``adaptation`` is what changed in the cluster meanwhile,
    ``failed_requests`` ended with an error.
    ``emulated`` are the nodes that kept the times of an emulated device. All times are the devices': ``time_scale``
    times as long passed by the wall clock.
    """

    remade_by: ClassVar[str] = "helixbench bench"

    plan: Plan
    workload: Workload
    concurrency: int
    routing: Routing
    seed: int
    window: Window
    prompt_tokens: int
    output_tokens: int
    requests: tuple[RequestRecord, ...]
    pipelines: tuple[tuple[tuple[str, int, int], ...], ...]
    nodes: dict[str, NodeUse]
    links: tuple[LinkUse, ...]
    timeline: tuple[TokenCount, ...]
    node_timeline: dict[str, tuple[NodePoint, ...]] = {}
    device_names: dict[str, str] = {}
    regions: dict[str, str] = {}
    testbed: str = ""
    arrivals: str = "closed loop"
    is_limited: bool = False
    simulated: bool = False
    emulated: tuple[str, ...] = ()
    time_scale: float = 1.0
    cut_short: str = ""
    stale: tuple[str, ...] = ()
    output_check: OutputCheck | None = None
    promised: Expected | None = None
    limits: LatencyLimits | None = None
    adaptation: AdaptationLog = AdaptationLog()
    failed_requests: int = 0
    provenance: Provenance = Provenance()

    def __post_init__(self) -> None:
        if self.prompt_tokens < 0 or self.output_tokens < 0:
            raise ValueError("prompt_tokens, output_tokens: need >= 0")
        if self.concurrency < 1:
            raise ValueError(f"concurrency: need >= 1, got {self.concurrency}")

    @property
    def total_tokens_per_s(self) -> float:
        """Prompt and output tokens a second, inside the window."""
        return (self.prompt_tokens + self.output_tokens) / self.window.seconds

    @property
    def output_tokens_per_s(self) -> float:
        """Output tokens a second, inside the window."""
        return self.output_tokens / self.window.seconds

    @property
    def goodput_per_s(self) -> float | None:
        """Requests/s that finished in the window within ``limits``; ``None`` where none are set."""
        return None if self.limits is None else sum(map(self._is_good, self.requests_in_window())) / self.window.seconds

    def _is_good(self, request: RequestRecord) -> bool:
        assert self.limits is not None
        limits, tpot_s = self.limits, request.tpot_s
        return (limits.max_ttft_s is None or self.ttft_s(request) <= limits.max_ttft_s) and (
            limits.max_tpot_s is None or tpot_s is None or tpot_s <= limits.max_tpot_s
        )

    @property
    def late_share(self) -> float:
        """Share of all emulated iterations in the window that took longer than the device would have."""
        uses = [self.nodes[name] for name in self.emulated if name in self.nodes]
        return sum(use.late_iterations for use in uses) / max(1, sum(use.iterations for use in uses))

    def requests_in_window(self) -> tuple[RequestRecord, ...]:
        """Requests that finished inside the window."""
        return tuple(r for r in self.requests if self.window.start_s <= r.finish_s < self.window.end_s)

    def began_s(self, request: RequestRecord) -> float:
        """When a request's wait is counted from: its arrival, but in an offline run its admission.

        Offline all wait from the start, so time since then says how late in the run a request's turn came.
        """
        if self.arrivals == "offline" and request.admitted_s is not None:
            return request.admitted_s
        return request.arrival_s

    def ttft_s(self, request: RequestRecord) -> float:
        """Time to first token: from ``began_s`` to the first output token."""
        return request.first_token_s - self.began_s(request)

    def latency_percentiles(
        self, kind: Literal["ttft", "tpot"], percents: tuple[float, ...]
    ) -> tuple[float, ...] | None:
        """Seconds at those percentiles over the requests that finished in the window; ``None`` where none did."""
        if kind == "ttft":
            values = [self.ttft_s(r) for r in self.requests_in_window()]
        else:
            values = [r.tpot_s for r in self.requests_in_window() if r.tpot_s is not None]
        if not values:
            return None
        return tuple(float(value) for value in np.percentile(values, percents))


def node_points(history: History, *, read_s: float) -> list[NodePoint]:
    """A node's series on the run's clock, without what was before the run; ``read_s`` is when the node was asked.

    The node answers after the iteration that it was in, so its times are late by one iteration at most.
    """
    begin_s = read_s - history.age_s
    points = []
    for index, interval in enumerate(history.intervals):
        start_s = begin_s + index * history.width_s
        end_s = min(start_s + history.width_s, read_s)
        if end_s <= max(start_s, 0.0):
            continue
        batch = interval.decode_tokens / interval.iterations if interval.iterations else None
        busy = min(interval.busy_s / (end_s - start_s), 1.0)
        points.append(NodePoint(end_s, batch, interval.kv_tokens, busy))
    return points


def token_counts(counts: Iterable[tuple[float, int, int]], until_s: float) -> tuple[TokenCount, ...]:
    """The run in equal intervals, from (time, prompt tokens, output tokens) of each event."""
    width_s = until_s / NUM_INTERVALS
    prompts, outputs = [0] * NUM_INTERVALS, [0] * NUM_INTERVALS
    for at_s, prompt, output in counts:
        if at_s < until_s:
            index = min(int(at_s / width_s), NUM_INTERVALS - 1)
            prompts[index] += prompt
            outputs[index] += output
    return tuple(TokenCount((i + 1) * width_s, prompts[i], outputs[i]) for i in range(NUM_INTERVALS))
