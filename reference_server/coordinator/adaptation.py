"""Adaptation: what a running plan does about nodes and links that change. Decides; the engine sends.

The watch says what state each node and link is in, reflow gives the weights that fit, and the coordinator is told which
nodes are lost and which take no further requests. What was decided is kept, to be logged, shown and recorded.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

import msgspec

from helixbench.reference_server.run_log import AdaptationLog, Recovered, Replanned, Reweighted, Transition
from helixbench.reference_server.wire.messages import Command, Forget, Load, Status
from helixbench.solver.flow.pipelines import pipelines
from helixbench.solver.problem.capacity import Capacities
from helixbench.solver.problem.plan import Pipeline, Plan
from helixbench.solver.scheduling.recover import Paths
from helixbench.solver.scheduling.reflow import Observed, Weights, is_worth_changing, reflow
from helixbench.solver.scheduling.requests import Moved
from helixbench.solver.scheduling.router import AdaptiveRouter, Router
from helixbench.solver.scheduling.watch import (
    TAKES_REQUESTS,
    Cause,
    Change,
    LinkChanged,
    NodeChanged,
    NodeState,
    Report,
    Watch,
)

_log = logging.getLogger(__name__)

TICK_S = 0.1
RENEW_S = 1.0
INCIDENT_S = 5.0
"""Requests that go on another way within this time of the first are recorded together: where states for a replay are
missing, each is found out by itself, and goes on once more."""

RELOAD_S = 10.0
"""Between two tries to load a stage on a node that came back without one."""

QUIET_S = 0.3
REFLOW_S = 1.0
LOAD_S = 300.0
Entry: TypeAlias = Transition | Reweighted | Recovered | Replanned
_RATIO_STEP = 0.05  # ratios are rounded to steps of this size: smaller changes are no reason to reflow
_RATIO_NOISE = 0.1  # and so far from 1 they are taken for 1: sending results is in an iteration's time, too


@dataclass(frozen=True)
class Adapted:
    """What a plan is adapted with.

    Attributes:
        run: id of the run.
        loads: node -> the command that loads its stage; ``None`` in a simulation, where nothing is loaded.
        plan: what is served.
        paths: where its requests can go.
        capacities: of the profile that the plan was made from; ``None`` where it does not hold one: then weights stay.
        outage_s: how long requests wait for nodes that cover the model again, before they end with an error.
        reflows: whether weights follow what is measured.
    """

    run: str
    plan: Plan
    loads: Mapping[str, Load | None]
    paths: Paths
    capacities: Capacities | None
    outage_s: float
    reflows: bool


EntryT = TypeVar("EntryT", Transition, Reweighted, Recovered, Replanned)


class Adaptation:
    """The states of a run's nodes, and what follows from them.

    Args:
        adapted: the plan, and how it may be adapted.
        router: whose weights are set, where it has any.
        now_s: the time, of any clock that never goes back; so are all others.
        say: is told each change in one line.
    """

    def __init__(
        self,
        adapted: Adapted,
        router: object,
        *,
        now_s: float,
        say: Callable[[str], None] = _log.warning,
    ) -> None:
        self.run = adapted.run
        self.longest_outage_s = adapted.outage_s
        self._adapted = adapted
        self._router = router if isinstance(router, Router) else None
        self._say = say
        self.watch = Watch(adapted.loads, now_s=now_s, load_s=LOAD_S)
        for node in adapted.loads:  # the engine begins when all of them have loaded
            self.watch.reported(node, _JUST_LOADED, now_s=now_s)
        self._renewed_s = self._reflowed_s = self._ticked_s = now_s
        self._covered_s = now_s  # when the nodes that take requests last covered the model
        self._observed = Observed()
        if adapted.capacities is not None and adapted.reflows:
            reflow(
                adapted.capacities, adapted.plan.placement, self._observed
            )  # what it needs is loaded now, not in a crisis
        self._is_changed = False
        self._reload_from_s: dict[str, float] = {}  # node -> when it may be told to load its stage once more
        self._foreign: set[str] = set()  # nodes that serve somebody else's run
        self.log: list[Entry] = []
        self.num_recovered: dict[str, int] = {"replayed": 0, "prefilled": 0, "moved": 0, "waited": 0}
        self._unsaid = dict(self.num_recovered)  # of those, what no line was said of yet
        self._moved_s = now_s  # when requests last went on another way

    @property
    def lost(self) -> frozenset[str]:
        """Nodes whose caches are gone: lost, or not yet back."""
        gone = (NodeState.LOST, NodeState.LOADING)
        return frozenset(node for node, state in self.watch.states.items() if state in gone)

    @property
    def passed_over(self) -> frozenset[str]:
        """Nodes that take no further requests."""
        return frozenset(node for node, state in self.watch.states.items() if state not in TAKES_REQUESTS)

    @property
    def draining_nodes(self) -> frozenset[str]:
        """Nodes that are being drained."""
        return frozenset(node for node, state in self.watch.states.items() if state is NodeState.DRAINING)

    @property
    def plan(self) -> Plan:
        """What is served at present."""
        return self._adapted.plan

    def replace(self, adapted: Adapted, *, now_s: float) -> None:
        """Another plan is served from now on, on some of the same nodes, which are loading its layers."""
        self._say(f"layers are moved: {', '.join(f'{node} {held}' for node, held in adapted.plan.placement.items())}")
        expected = adapted.plan.predicted.expected
        tokens_per_s = expected[-1].total_tokens_per_s if expected else None
        placement = dict(adapted.plan.placement)
        self.log.append(Replanned(at_s=now_s, placement=placement, expected_tokens_per_s=tokens_per_s))
        for node in self.watch.states.keys() - adapted.plan.placement.keys():
            self.watch.removed(node)
        self._adapted = adapted
        for node in adapted.plan.placement:
            self._note(self.watch.added(node, now_s=now_s))
        self._observed = Observed()
        if self._router is not None:
            self._router.set_weights(pipelines(adapted.plan))

    def take_changed(self) -> bool:
        """Whether states of nodes or links changed since this was last asked."""
        changed, self._is_changed = self._is_changed, False
        return changed

    def heard(self, node: str, status: Status, *, now_s: float) -> Command | None:
        """A node reports, or says whose run it serves; the answer that it gets, if any.

        A node that was given up, and is there again, is told to forget all requests, or to load its stage again.
        """
        if self.watch.states.get(node) is not NodeState.LOST:
            if status.run == self.run:
                self.reported(node, status.report, now_s=now_s)
            elif self.watch.states.get(node) is not NodeState.LOADING:
                detail = f"it serves {status.owner}" if status.run else "its stage is gone"
                self.gone(node, Cause.EXITED, now_s=now_s, detail=detail)
            return None
        if status.run == self.run:
            self.added(node, now_s=now_s)
            return Forget()
        if status.run:
            if node not in self._foreign:
                self._say(f"node {node}: it serves run {status.run} of {status.owner} now")
                self._foreign.add(node)
            return None
        self._foreign.discard(node)
        if now_s < self._reload_from_s.get(node, now_s):
            return None  # it could not load its stage a moment ago
        self._reload_from_s[node] = now_s + RELOAD_S
        self.added(node, now_s=now_s)
        return self._adapted.loads[node]

    def gone(self, node: str, cause: Cause, *, now_s: float, detail: str = "") -> None:
        """The node's connection closed, or it cannot serve any more."""
        self._note(self.watch.lost(node, cause, now_s=now_s, detail=detail))

    def reported(self, node: str, report: Report, *, now_s: float) -> None:
        """A node of this run reports."""
        self._note(self.watch.reported(node, report, now_s=now_s))

    def added(self, node: str, *, now_s: float) -> None:
        """A node that was given up is there again."""
        self._note(self.watch.added(node, now_s=now_s))

    def link(self, link: tuple[str, str], *, is_up: bool, now_s: float) -> None:
        """A link is known to carry nothing, or to carry again."""
        self._note(self.watch.link(link, is_up=is_up, now_s=now_s))

    def draining(self, node: str, *, now_s: float) -> None:
        """The node takes no new requests from now on."""
        self._note(self.watch.draining(node, now_s=now_s))

    def drained(self, node: str, *, now_s: float) -> None:
        """Nothing is in flight on the draining node any more."""
        self._note(self.watch.drained(node, now_s=now_s))

    def moved(self, moved: Sequence[Moved], *, now_s: float) -> None:
        """Requests lost their pipeline; how each goes on is recorded, those of one incident together."""
        counts = dict.fromkeys(self.num_recovered, 0)
        again = held = 0
        for one in moved:
            held += one.state.context_tokens * self._adapted.plan.num_layers
            if one.recovery is None:
                counts["waited"] += 1
                continue
            again += one.state.context_tokens * one.recovery.layers
            if not one.recovery.num_rebuilt:
                counts["moved"] += 1
            else:
                counts["prefilled" if one.recovery.source is None else "replayed"] += 1
        self.num_recovered = {what: before + counts[what] for what, before in self.num_recovered.items()}
        self._unsaid = {what: before + counts[what] for what, before in self._unsaid.items()}
        self._moved_s = now_s
        new = Recovered(at_s=now_s, layer_tokens_again=again, layer_tokens_held=held, **counts)
        last = self.log[-1] if self.log else None
        if isinstance(last, Recovered) and now_s - last.at_s < INCIDENT_S:
            self.log[-1] = _sum_of(last, new)
        else:
            self.log.append(new)

    def tick(self, now_s: float) -> bool:
        """Time passed; returns whether leases are to be renewed."""
        if now_s - self._ticked_s >= TICK_S:
            self._ticked_s = now_s
            self._note(self.watch.tick(now_s))
            self._say_moved(now_s)
        is_due = now_s - self._renewed_s >= RENEW_S
        if is_due:
            self._renewed_s = now_s
        return is_due

    def _say_moved(self, now_s: float) -> None:
        """One line for the requests that went on another way, once there were none for a moment."""
        num_moved = sum(self._unsaid.values())
        if num_moved and now_s - self._moved_s >= QUIET_S:
            said = ", ".join(f"{count} {what}" for what, count in self._unsaid.items() if count)
            self._say(f"requests went on another way: {said}")
            self._unsaid = dict.fromkeys(self._unsaid, 0)

    def reflow(self, now_s: float) -> None:
        """Set the weights that fit what is known of nodes and links, where they differ enough from those in use."""
        if self._adapted.capacities is None or self._router is None or not self._adapted.reflows:
            return
        if now_s - self._reflowed_s < REFLOW_S and not self._is_changed:
            return
        self._reflowed_s = now_s
        observed = Observed(
            ratios={node: _rounded(ratio) for node, ratio in self.watch.ratios.items() if _rounded(ratio) != 1},
            unusable=self.passed_over,
            links_down=self.watch.links_down,
        )
        if observed == self._observed:
            return
        self._observed = observed
        if isinstance(self._router, AdaptiveRouter):
            self._router.set_ratios(observed.ratios)
        weights = reflow(self._adapted.capacities, self._adapted.plan.placement, observed)
        if not weights.pipelines or not is_worth_changing(self._router.shares, weights.shares()):
            return
        self._router.set_weights(weights.pipelines)
        self._say(f"weights follow what is measured: max-flow {weights.tokens_per_s:.0f} tokens/s, {_shares(weights)}")
        shares = tuple((self._router.index_of(pipeline), share) for pipeline, share in weights.shares().items())
        self.log.append(Reweighted(at_s=now_s, max_flow_tokens_per_s=weights.tokens_per_s, shares=shares))

    def outage_s(self, now_s: float, *, is_covered: bool) -> float:
        """For how long the nodes that take requests have not covered the model."""
        if is_covered:
            self._covered_s = now_s
        return now_s - self._covered_s

    def _note(self, changes: Sequence[Change]) -> None:
        for change in changes:
            if isinstance(change, NodeChanged) and _HEALTHY.issuperset((change.before, change.after)):
                continue
            self._is_changed = True
            transition = _transition(change)
            self.log.append(transition)
            self._say(transition.line)


_JUST_LOADED = Report(
    due_in_s=5.0,
    iterations=0,
    measured_s=0.0,
    predicted_s=0.0,
    has_work=False,
    progress_age_s=0.0,
    kv_used_tokens=0,
)


_HEALTHY = frozenset({NodeState.IDLE, NodeState.PROGRESSING})  # a change between these is no news


def _sum_of(one: Recovered, other: Recovered) -> Recovered:
    """Both, at the time of the first."""
    return Recovered(
        at_s=one.at_s,
        replayed=one.replayed + other.replayed,
        prefilled=one.prefilled + other.prefilled,
        moved=one.moved + other.moved,
        waited=one.waited + other.waited,
        layer_tokens_again=one.layer_tokens_again + other.layer_tokens_again,
        layer_tokens_held=one.layer_tokens_held + other.layer_tokens_held,
    )


def recorded(log: Sequence[Entry], *, since_s: float, time_scale: float) -> AdaptationLog:
    """The log with times of the devices since ``since_s``, as a run's record has them."""

    def of(kind: type[EntryT]) -> tuple[EntryT, ...]:
        found = (entry for entry in log if isinstance(entry, kind))
        return tuple(msgspec.structs.replace(entry, at_s=(entry.at_s - since_s) / time_scale) for entry in found)

    return AdaptationLog(
        transitions=of(Transition), reweighted=of(Reweighted), recovered=of(Recovered), replanned=of(Replanned)
    )


def _transition(change: Change) -> Transition:
    if isinstance(change, NodeChanged):
        return Transition(
            at_s=change.at_s,
            node=change.node,
            before=change.before.value,
            after=change.after.value,
            cause=change.cause.value,
            detail=change.detail,
        )
    assert isinstance(change, LinkChanged)
    up, down = ("down", "up") if change.is_up else ("up", "down")
    return Transition(
        at_s=change.at_s, node=change.src, peer=change.dst, before=up, after=down, cause=change.cause.value
    )


def _rounded(ratio: float) -> float:
    return 1.0 if abs(ratio - 1) < _RATIO_NOISE else round(ratio / _RATIO_STEP) * _RATIO_STEP


def _shares(weights: Weights) -> str:
    shares = sorted(weights.shares().items(), key=lambda pair: -pair[1])
    shown = ", ".join(f"{100 * share:.0f} % {_path(pipeline)}" for pipeline, share in shares[:4])
    return shown + (f" and {len(shares) - 4} more" if len(shares) > 4 else "")


def _path(pipeline: Pipeline) -> str:
    return "-".join(hop.node for hop in pipeline)
