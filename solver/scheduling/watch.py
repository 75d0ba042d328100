"""Watch: which nodes and links can be relied on, from what they report. Pure: (event, now) -> changes of state.

Health follows progress. Agents report from the loop that serves, so a loop that hangs is silent, however well its
process and its connections look; and every report says by when the next one is due, so a long iteration is not mistaken
for a hang, and a saturated node that works is never called stalled.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Iterable, Mapping

import msgspec

REPORT_EVERY_S = 0.5
"""An agent reports this often while its iterations are shorter."""

STALLED_AFTER_S = 0.5
"""A report overdue by this much: new requests pass over the node."""

LOST_AFTER_S = 2.0
"""A report overdue by this much: the node's requests are recovered elsewhere."""

SILENT_AFTER_S = 2.0
"""A peer that answers nothing for so long beyond its own due time: the link to it is down."""

SLOW_RATIO, RECOVERED_RATIO = 1.3, 1.15
"""Measured over predicted iteration time at which a node is called slow, and below which it no longer is."""

SLOW_ITERATIONS, SLOW_WINDOW_S = 10, 5.0
"""The ratio is taken over at least this many iterations and seconds."""

OWN_DELAY_S = 0.25
"""A gap between two looks at the clock by which the watcher itself was late: others are given that time."""


class NodeState(enum.StrEnum):
    """State of a node, as ``/health`` shows it."""

    LOADING = "loading"
    IDLE = "idle"
    PROGRESSING = "progressing"
    SLOW = "slow"
    STALLED = "stalled"
    LOST = "lost"
    DRAINING = "draining"
    DRAINED = "drained"


TAKES_REQUESTS = frozenset({NodeState.IDLE, NodeState.PROGRESSING, NodeState.SLOW})
"""States in which new requests are routed over a node."""

_STEADY = frozenset({NodeState.DRAINING, NodeState.DRAINED, NodeState.LOST})  # left only when told to


class Cause(enum.StrEnum):
    """Why a state changed."""

    REPORTED = "it reports"
    OVERDUE = "its report is overdue"
    DISCONNECTED = "its connection is closed"
    EXITED = "its process ended"
    FAILED = "it cannot serve"
    RATIO = "measured over predicted iteration time"
    PEER_SILENT = "it answers nothing on this link"
    PEER_DISCONNECTED = "the connection between them is closed"
    PEER_ANSWERS = "it answers again"
    ASKED = "asked to"
    LEAVING = "its agent was told to end"


class PeerSeen(msgspec.Struct, frozen=True, array_like=True):
    """How an agent sees a peer that it sends work to: whether connected, and by how much its answer is overdue."""

    peer: str
    is_connected: bool
    silent_s: float


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What an agent says of itself, from its own loop. Counts and sums since its stage was loaded.

    ``due_in_s``: the next report comes within this time. ``measured_s`` and ``predicted_s`` are sums over the same
    iterations; both are 0 where the agent has no cost model. ``progress_age_s`` is the time since an iteration last
    ended. ``num_dropped`` counts messages of old epochs and foreign runs. ``is_leaving``: it was told to end, and wants
    to be drained first.
    """

    due_in_s: float
    iterations: int
    measured_s: float
    predicted_s: float
    has_work: bool
    progress_age_s: float
    kv_used_tokens: int
    num_dropped: int = 0
    is_leaving: bool = False
    peers: tuple[PeerSeen, ...] = ()


class NodeChanged(msgspec.Struct, frozen=True):
    """A node went from one state to another at ``at_s``; ``detail`` is for people."""

    node: str
    before: NodeState
    after: NodeState
    cause: Cause
    at_s: float
    detail: str = ""


class LinkChanged(msgspec.Struct, frozen=True):
    """A link between two agents went down or healed at ``at_s``."""

    src: str
    dst: str
    is_up: bool
    cause: Cause
    at_s: float


Change = NodeChanged | LinkChanged


class _Sample(msgspec.Struct, frozen=True):
    at_s: float
    iterations: int
    measured_s: float
    predicted_s: float


class _Watched(msgspec.Struct):
    """Mutable state of one node."""

    state: NodeState
    due_s: float  # by when the next report is due
    due_in_s: float = REPORT_EVERY_S  # as its last report said
    ratio: float = 1.0
    last: Report | None = None
    samples: deque[_Sample] = msgspec.field(default_factory=deque)  # of the ratio's window, oldest first


class Watch:
    """States of the nodes of one run.

    Args:
        nodes: nodes to watch; they are loading until they first report.
        now_s: the time, of any clock that never goes back.
        load_s: how long loading may take before a silent node is called stalled.
    """

    def __init__(self, nodes: Iterable[str], *, now_s: float, load_s: float) -> None:
        self._load_s = load_s
        self._nodes = {node: _Watched(NodeState.LOADING, now_s + load_s) for node in nodes}
        self._down: set[tuple[str, str]] = set()  # links that carry nothing, as (from, to)
        self._looked_s = now_s

    @property
    def states(self) -> Mapping[str, NodeState]:
        """Node -> its state."""
        return {node: watched.state for node, watched in self._nodes.items()}

    @property
    def ratios(self) -> Mapping[str, float]:
        """Node -> measured over predicted iteration time; 1 where that is not known yet."""
        return {node: watched.ratio for node, watched in self._nodes.items()}

    @property
    def links_down(self) -> frozenset[tuple[str, str]]:
        """Links between agents that carry nothing, as (from, to)."""
        return frozenset(self._down)

    def last_report(self, node: str) -> Report | None:
        """What the node said last."""
        return self._nodes[node].last

    def takes_requests(self, node: str) -> bool:
        """Whether new requests are routed over the node."""
        watched = self._nodes.get(node)
        return watched is not None and watched.state in TAKES_REQUESTS

    def reported(self, node: str, report: Report, *, now_s: float) -> list[Change]:
        """A report came. One of a lost node changes nothing: it has to be added again, with nothing of its past."""
        watched = self._nodes.get(node)
        if watched is None or watched.state is NodeState.LOST:
            return []
        watched.last = report
        watched.due_in_s = report.due_in_s
        watched.due_s = now_s + report.due_in_s
        _take_ratio(watched, report, now_s)
        changes = self._links(node, report, now_s)
        if watched.state in _STEADY:
            return changes
        if report.is_leaving:
            return changes + self._move(node, NodeState.DRAINING, Cause.LEAVING, now_s)
        if watched.ratio >= SLOW_RATIO or (watched.state is NodeState.SLOW and watched.ratio >= RECOVERED_RATIO):
            after, cause, detail = NodeState.SLOW, Cause.RATIO, f"{watched.ratio:.2f}"
        else:
            after = NodeState.PROGRESSING if report.has_work else NodeState.IDLE
            was_slow = watched.state is NodeState.SLOW
            cause, detail = (Cause.RATIO, f"{watched.ratio:.2f}") if was_slow else (Cause.REPORTED, "")
        return changes + self._move(node, after, cause, now_s, detail)

    def tick(self, now_s: float) -> list[Change]:
        """Time passed; call it after all messages that wait have been taken in, every 0.1 s or so."""
        late_s = now_s - self._looked_s
        self._looked_s = now_s
        if late_s > OWN_DELAY_S:
            # The watcher itself did not run: reports may lie in its sockets, and nobody is late because it was.
            for watched in self._nodes.values():
                watched.due_s += late_s
        changes: list[Change] = []
        for node, watched in self._nodes.items():
            overdue_s = now_s - watched.due_s
            if watched.state is NodeState.LOST or overdue_s <= STALLED_AFTER_S:
                continue
            detail = f"by {overdue_s:.1f} s"
            if overdue_s > LOST_AFTER_S:
                changes += self._move(node, NodeState.LOST, Cause.OVERDUE, now_s, detail)
            elif watched.state not in _STEADY:
                changes += self._move(node, NodeState.STALLED, Cause.OVERDUE, now_s, detail)
        return changes

    def lost(self, node: str, cause: Cause, *, now_s: float, detail: str = "") -> list[Change]:
        """The node's connection closed or its process ended: it is lost at once."""
        return self._move(node, NodeState.LOST, cause, now_s, detail) if node in self._nodes else []

    def link(self, link: tuple[str, str], *, is_up: bool, now_s: float) -> list[Change]:
        """A link is known to carry nothing, or to carry again, from elsewhere than reports."""
        if is_up == (link not in self._down):
            return []
        (self._down.discard if is_up else self._down.add)(link)
        cause = Cause.PEER_ANSWERS if is_up else Cause.PEER_SILENT
        return [LinkChanged(*link, is_up, cause, now_s)]

    def draining(self, node: str, *, now_s: float) -> list[Change]:
        """The node takes no new requests from now on."""
        return self._move(node, NodeState.DRAINING, Cause.ASKED, now_s)

    def drained(self, node: str, *, now_s: float) -> list[Change]:
        """Nothing is in flight on a draining node any more: it is safe to remove."""
        return self._move(node, NodeState.DRAINED, Cause.ASKED, now_s)

    def added(self, node: str, *, now_s: float) -> list[Change]:
        """A node joins, or joins again: it is loading, and all that was known of it is forgotten."""
        before = self._nodes[node].state if node in self._nodes else NodeState.LOST
        self._nodes[node] = _Watched(NodeState.LOADING, now_s + self._load_s)
        self._down = {link for link in self._down if node not in link}
        return [NodeChanged(node, before, NodeState.LOADING, Cause.ASKED, now_s)]

    def removed(self, node: str) -> None:
        """The node is no longer part of the run."""
        self._nodes.pop(node, None)
        self._down = {link for link in self._down if node not in link}

    def _links(self, node: str, report: Report, now_s: float) -> list[Change]:
        """Links from ``node``: one is down while its peer is not connected, or silent beyond the peer's own due time.

        A peer that is itself stalled or lost is a node's fault, not the link's: it is judged by its own reports.
        """
        changes: list[Change] = []
        for seen in report.peers:
            peer = self._nodes.get(seen.peer)
            if peer is None or peer.state in (NodeState.STALLED, NodeState.LOST):
                continue
            link = (node, seen.peer)
            is_silent = seen.silent_s > peer.due_in_s + SILENT_AFTER_S
            is_up = seen.is_connected and not is_silent
            if is_up == (link not in self._down):
                continue
            if is_up:
                self._down.discard(link)
                cause = Cause.PEER_ANSWERS
            else:
                self._down.add(link)
                cause = Cause.PEER_SILENT if seen.is_connected else Cause.PEER_DISCONNECTED
            changes.append(LinkChanged(node, seen.peer, is_up, cause, now_s))
        return changes

    def _move(self, node: str, after: NodeState, cause: Cause, now_s: float, detail: str = "") -> list[Change]:
        watched = self._nodes[node]
        before, watched.state = watched.state, after
        if after is NodeState.LOST:
            self._down = {link for link in self._down if node not in link}
        return [] if before is after else [NodeChanged(node, before, after, cause, now_s, detail)]


def _take_ratio(watched: _Watched, report: Report, now_s: float) -> None:
    """Update the ratio over the shortest recent window that is long enough to tell.

    The window is the last ``SLOW_WINDOW_S`` seconds, or longer where these hold fewer than ``SLOW_ITERATIONS``
    iterations. Until there is such a window the ratio stays what it was.
    """
    samples = watched.samples
    if samples and report.iterations < samples[-1].iterations:
        samples.clear()  # another stage was loaded: its counts begin again
    now = _Sample(now_s, report.iterations, report.measured_s, report.predicted_s)
    samples.append(now)

    def is_enough(since: _Sample) -> bool:
        return now_s - since.at_s >= SLOW_WINDOW_S and now.iterations - since.iterations >= SLOW_ITERATIONS

    while len(samples) > 1 and is_enough(samples[1]):
        samples.popleft()
    first = samples[0]
    predicted_s = now.predicted_s - first.predicted_s
    if is_enough(first) and predicted_s > 0:
        watched.ratio = (now.measured_s - first.measured_s) / predicted_s
