"""The coordinator's place in a simulated cluster: the server's own ``Coordinator``, taking messages one after another.

Each takes as long as the profile says: ``message_s``, ``token_s`` for each token in it, ``request_s`` for each request
that ends (and lets another one in). What a message sets off goes out when its time is over.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import TypeAlias

from helixbench.profiler.cluster import COORDINATOR as COORDINATOR_NAME
from helixbench.profiler.cluster import Coordinator as CoordinatorTimes
from helixbench.reference_server.simulation.checks import Ledger
from helixbench.reference_server.simulation.load import Load
from helixbench.reference_server.simulation.node import Message, Send
from helixbench.solver.scheduling.coordinator import Actions, Coordinator, Request
from helixbench.solver.simulation.event_loop import COORDINATOR, Kernel

_Inbox: TypeAlias = deque[list[int] | Request]


class Front:
    """Feeds the coordinator with tokens and requests, and carries out what it decides."""

    def __init__(
        self,
        coordinator: Coordinator,
        times: CoordinatorTimes,
        kernel: Kernel,
        *,
        load: Load,
        ledger: Ledger,
        send: Send,
        on_answer: Callable[[], None],
    ) -> None:
        self.coordinator = coordinator
        self._kernel, self._load, self._ledger, self._send = kernel, load, ledger, send
        self._message_s = times.message_s or 0.0
        self._token_s = times.token_s or 0.0
        self._request_s = times.request_s or 0.0
        self._on_answer = on_answer
        self._inbox: _Inbox = deque()  # tokens from a node (their requests), or a request from outside
        self._is_busy = False

    def start(self, num_requests: int) -> None:
        """The first requests arrive: so many, or as many as are to wait from the start."""
        actions = Actions({}, [])
        if num_requests:
            self._submit(self._load.new_requests(num_requests, self._kernel.now_s), actions)
        self._refill(0, actions)
        self._dispatch(actions)

    def receive(self, message: list[int] | Request) -> None:
        """A last node's new tokens, or a request from outside."""
        self._inbox.append(message)
        if not self._is_busy:
            self._take()

    def _take(self) -> None:
        message = self._inbox.popleft()
        now_s = self._kernel.now_s
        if isinstance(message, Request):
            actions = Actions({}, [])
            self._submit([message], actions)
            self._dispatch(actions)
            return
        actions = self.coordinator.sampled([(request, 0) for request in message])
        for event in actions.events:
            self._ledger.told(event)
        work_s = self._message_s + len(message) * self._token_s
        if self._request_s:
            work_s += self._request_s * sum(1 for event in actions.events if event.reason)
        if work_s > 0:
            self._is_busy = True
            self._kernel.at(now_s + work_s, COORDINATOR, self._done, actions)
        else:
            self._answer(actions)

    def _done(self, actions: Actions) -> None:
        self._is_busy = False
        self._answer(actions)
        while self._inbox and not self._is_busy:
            self._take()

    def _answer(self, actions: Actions) -> None:
        ended = self._load.record(actions.events, self._kernel.now_s)
        self._refill(ended, actions)
        self._dispatch(actions)
        self._on_answer()

    def _refill(self, num_ended: int, actions: Actions) -> None:
        """Requests that come in this moment travel in its messages."""
        while new := self._load.following(num_ended, self.coordinator.num_waiting, self._kernel.now_s):
            self._submit(new, actions)
            num_ended = 0

    def _submit(self, requests: Sequence[Request], actions: Actions) -> None:
        for request in requests:
            self._ledger.submitted(request)
        self.coordinator.submit(requests, onto=actions)

    def _dispatch(self, actions: Actions) -> None:
        now_s = self._kernel.now_s
        for node, outgoing in actions.sends.items():
            for opened in outgoing.opens:
                if opened.hops[0].node == node:
                    self._load.admitted(opened.request, now_s)
            message = Message(outgoing.items, outgoing.opens, outgoing.closes)
            self._send(COORDINATOR_NAME, node, len(outgoing.tokens), message)
