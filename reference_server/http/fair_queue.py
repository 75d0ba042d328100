"""Requests that wait, so that clients take turns: a thousand prompts of one do not stand before another's one."""

from __future__ import annotations

import threading
from collections import OrderedDict

from helixbench.solver.scheduling.requests import Request


class FairQueue:
    """Requests by client, for two threads: one adds and removes, the other takes."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # client -> its requests by number, in order; the client whose turn is next comes first
        self._clients: OrderedDict[object, OrderedDict[int, Request]] = OrderedDict()
        self._client_of: dict[int, object] = {}  # request -> client
        self._num_tokens = 0

    def __len__(self) -> int:
        return len(self._client_of)

    @property
    def num_tokens(self) -> int:
        """Prompt tokens of the requests that wait."""
        return self._num_tokens

    def add(self, request: Request, client: object) -> None:
        """The client's last request; a client that had none comes last."""
        with self._lock:
            self._clients.setdefault(client, OrderedDict())[request.number] = request
            self._client_of[request.number] = client
            self._num_tokens += len(request.prompt)

    def take(self) -> Request | None:
        """The first request of the client whose turn it is, which comes last then."""
        with self._lock:
            if not self._clients:
                return None
            client, requests = next(iter(self._clients.items()))
            number, request = requests.popitem(last=False)
            self._forget(number, request)
            if requests:
                self._clients.move_to_end(client)
            else:
                del self._clients[client]
            return request

    def remove(self, number: int) -> bool:
        """Drop a request; whether it was still there."""
        with self._lock:
            if number not in self._client_of:
                return False
            client = self._client_of[number]
            requests = self._clients[client]
            self._forget(number, requests.pop(number))
            if not requests:
                del self._clients[client]
            return True

    def _forget(self, number: int, request: Request) -> None:
        del self._client_of[number]
        self._num_tokens -= len(request.prompt)
