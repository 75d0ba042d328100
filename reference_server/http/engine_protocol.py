"""What the HTTP server needs of an engine, and what the engine tells it."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Literal, Protocol

import msgspec

from helixbench.solver.scheduling.requests import Request
from helixbench.solver.scheduling.work import Scores

FinishReason = Literal["", "stop", "length"]


class TokenOut(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One output token. The last one of a request is ``finished`` and has a ``reason``; a stop token is given too."""

    token: int
    finished: bool = False
    reason: FinishReason = ""
    scores: Scores | None = None

    def __post_init__(self) -> None:
        if self.finished != bool(self.reason):
            raise ValueError(f"reason: need one for the last token and none before, got {self.reason!r}")


class NodeHealth(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A node's state in a word, its measured over predicted iteration time, and seconds since an iteration last ended.

    The age is ``None`` where the node has not reported yet.
    """

    state: str
    ratio: float = 1.0
    progress_age_s: float | None = None


class Health(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How the cluster stands.

    Attributes:
        is_ready: requests are served.
        detail: why not, in words.
        nodes: node -> how it stands.
        recovered: requests that lost their pipeline, by how they went on.
    """

    is_ready: bool
    detail: str = ""
    nodes: dict[str, NodeHealth] = {}
    recovered: dict[str, int] = {}


class Load(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Requests that hold KV slots, requests that wait for some, and the share of KV slots that are held.

    The share is that of the fullest node: when it is full, requests wait. ``late_iterations`` of emulated devices took
    longer than they were to take; some seconds old.
    """

    num_running: int
    num_waiting: int
    waiting_tokens: int
    kv_usage: float
    late_iterations: int = 0


class RequestRefused(ValueError):  # noqa: N818 - a verdict on the request, not a fault of the engine
    """The request can never be served, e.g. its KV cache is larger than what the nodes hold together."""


class RequestFailed(RuntimeError):  # noqa: N818 - of one request; the engine goes on with all others
    """A node could not run the request."""


class EngineUnavailable(RuntimeError):  # noqa: N818 - a state of the cluster
    """The cluster is down, or went down with requests in flight."""


class EngineLike(Protocol):
    """An engine that serves many requests at once, each as a stream of tokens."""

    def generate(self, request: Request, *, client: object) -> AsyncGenerator[TokenOut, None]:
        """The tokens that follow the prompt, as they come. Closing it (``aclose``) aborts the request.

        Args:
            request: with a number of its own.
            client: whose turn it uses up; where requests wait, clients take turns.

        Raises:
            RequestRefused: before the first token.
            EngineUnavailable: at any time.
        """
        ...

    def health(self) -> Health:
        """How it stands now. Returns at once."""
        ...

    def load(self) -> Load:
        """How much there is to do now. Returns at once."""
        ...

    def drain(self, node: str) -> None:
        """The node takes no new requests from now on. Returns at once."""
        ...
