"""Options of the HTTP server: names, keys, and bounds on what clients may ask of it."""

from __future__ import annotations

import msgspec

# Environment variable with the keys that a server requires.
API_KEY_VARIABLE = "HELIXBENCH_API_KEY"


class HttpOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Options of ``helixbench serve`` that concern HTTP.

    Attributes:
        model_names: names that the model is served under, the first one reported; by default its own.
        api_keys: a request needs one of these as its bearer token; none for an open server.
        cors_origins: origins whose pages may call the server; ``*`` for any.
        max_prompts: sequences of one request: its prompts times ``n``.
        max_stops: stop strings of one request, and its stop tokens.
        max_waiting: sequences that wait for room in KV caches; more get 429.
        max_waiting_tokens: prompt tokens of those that wait.
        max_connections: open connections. When all are in use, the one that has been sending its request longest
            gives way; where all are being answered, a new one gets 503.
        max_body_bytes: size of a request's body.
        request_timeout_s: time to send a whole request.
        drain_s: time for requests in flight to end once the server is told to stop.
        stall_timeout_s: time that a client may take nothing of an answer that is ready.
    """

    model_names: tuple[str, ...] = ()
    api_keys: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    max_prompts: int = 1024
    max_stops: int = 64
    max_waiting: int = 2048
    max_waiting_tokens: int = 4 * 2**20
    max_connections: int = 4096
    max_body_bytes: int = 8 * 2**20
    request_timeout_s: float = 30.0
    stall_timeout_s: float = 30.0
    drain_s: float = 30.0

    def __post_init__(self) -> None:
        for field in self.__struct_fields__:
            value = getattr(self, field)
            if isinstance(value, int | float) and not value > 0:
                raise ValueError(f"{field}: need more than 0, got {value}")
        if self.max_prompts > self.max_waiting:
            raise ValueError(f"max_prompts: need at most max_waiting, got {self.max_prompts} > {self.max_waiting}")
        for field in ("model_names", "api_keys", "cors_origins"):
            if "" in getattr(self, field):
                raise ValueError(f"{field}: need a text, got an empty one")
